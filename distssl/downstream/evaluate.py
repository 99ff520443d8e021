"""What a backbone is worth on labelled images: rows of (backbone, task, number of labels, accuracy)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from distssl import atomic, collectives
from distssl.config import Eval, Run
from distssl.context import Context
from distssl.data.shards import Dataset
from distssl.downstream import classify, features
from distssl.downstream.features import Features
from distssl.errors import ConfigError

SUMMARY = "summary.json"
MOST_ONLINE = 5000  # training features of the kNN evaluation during pretraining, and a fifth of it for the test


@dataclass(frozen=True)
class Row:
    """One figure. labels: how many were used, None for all. std: over label subsets, 0 where there is one."""

    backbone: str  # "pretrained", "random" or "supervised"
    task: str
    labels: int | None
    metric: str
    value: float
    std: float = 0.0
    num_draws: int = 1


@dataclass(frozen=True)
class Labelled:
    """Labelled images to train and to test on."""

    train: Dataset
    train_ids: np.ndarray
    test: Dataset
    test_ids: np.ndarray


def labelled(train: Dataset, test: Dataset | None) -> Labelled:
    """Without a test set of its own a fifth of the training set's labels is held out.

    Raises ConfigError where there are no labels, or not the same ones.
    """
    if test is not None and test.classes != train.classes:
        raise ConfigError(
            f"eval.test_source: its classes are {_some(test.classes)}, those of the training images "
            f"{_some(train.classes)}; the same names in the same order are right"
        )
    train_ids = train.labelled_ids()
    if test is None:
        train_ids, test_ids = features.split(train_ids)
    else:
        test_ids = test.labelled_ids()
    if not len(train_ids) or not len(test_ids):
        key = "eval.source" if not len(train_ids) else "eval.test_source"
        raise ConfigError(f"{key}: has no labelled images; class subfolders, a label column or .cls files are right")
    return Labelled(train, train_ids, test or train, test_ids)


def _some(classes: Sequence[str]) -> str:
    return f"{len(classes)} ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


class Evaluation:
    """Evaluates backbones of one run, all by the same recipe."""

    def __init__(self, run: Run, data: Labelled, context: Context) -> None:
        self.cfg: Eval = run.eval
        self.data = data
        self.context = context
        self.how = features.Extraction.of_run(run, context.device)

    def online(self, backbone: torch.nn.Module) -> dict[str, float]:
        """kNN accuracy on at most MOST_ONLINE images, for a point on the training curve. Every rank calls it."""
        train = self._extract(backbone, self.data.train, features.subset(self.data.train_ids, MOST_ONLINE, seed=0))
        test = self._extract(backbone, self.data.test, features.subset(self.data.test_ids, MOST_ONLINE // 5, seed=0))
        return {"knn": classify.knn(train, test, neighbours=self.cfg.neighbours)}

    def rows(self, name: str, backbone: torch.nn.Module, tasks: Sequence[str]) -> list[Row]:
        """The rows of one backbone. Every rank calls it and gets them."""
        train = self._extract(backbone, self.data.train, self.data.train_ids)
        test = self._extract(backbone, self.data.test, self.data.test_ids)
        rows = self._score(name, train, test, tasks) if self.context.rank == 0 else []
        return collectives.broadcast_object(rows)

    def _extract(self, backbone: torch.nn.Module, dataset: Dataset, ids: np.ndarray) -> Features:
        return features.extract(backbone, dataset, ids, self.how, self.context)

    def _score(self, name: str, train: Features, test: Features, tasks: Sequence[str]) -> list[Row]:
        score = {
            "knn": functools.partial(classify.knn, neighbours=self.cfg.neighbours),
            "linear": functools.partial(classify.linear, inverse_l2=self.cfg.inverse_l2),
        }
        rows = []
        for task in tasks:
            for num in self.cfg.labels:
                whole = num is None or num >= len(train.ids)
                draws = 1 if whole else self.cfg.num_draws
                values = [score[task](_pick(train, None if whole else num, seed), test) for seed in range(draws)]
                mean, std = float(np.mean(values)), float(np.std(values, ddof=1)) if draws > 1 else 0.0
                rows.append(Row(name, task, None if whole else num, "accuracy", mean, std, draws))
        return list(dict.fromkeys(rows))  # more labels asked for than there are is "all" once more


def _pick(train: Features, num: int | None, seed: int) -> Features:
    if num is None:
        return train
    here = np.isin(train.ids, features.subset(train.ids, num, seed))
    return Features(train.ids[here], train.x[here], train.labels[here])


def write_summary(run_dir: Path, rows: Sequence[Row]) -> list[Row]:
    """Add rows to summary.json in the run folder, each in the place of an older one of its kind; all rows there."""
    merged = {(row.backbone, row.task, row.labels): row for row in [*read_summary(run_dir), *rows]}
    with atomic.replacing(run_dir / SUMMARY) as file:
        file.write_text(json.dumps({"rows": [asdict(row) for row in merged.values()]}, indent=1) + "\n")
    return list(merged.values())


def read_summary(run_dir: Path) -> list[Row]:
    """The rows of summary.json, [] where there is none."""
    path = run_dir / SUMMARY
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []
