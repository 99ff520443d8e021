"""What a task needs of a run and its labels, told before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distssl import config, method, plan
from distssl.config import Run
from distssl.data.locations import Place
from distssl.data.shards import Dataset
from distssl.downstream import fit, labels
from distssl.downstream.depth import Depth
from distssl.downstream.finetune import Finetune
from distssl.downstream.keypoints import Keypoints
from distssl.downstream.labels import Labelled
from distssl.downstream.rows import BACKBONES
from distssl.downstream.segment import Segment
from distssl.downstream.task import Facts, Network
from distssl.errors import ConfigError

WITH_FEW_LABELS = ("knn", "linear", "finetune")  # tasks evaluated for each of eval.labels


def network(task: str) -> type[Network]:
    """The network of one of config.FITTED_TASKS."""
    if task == "detect":  # torchvision's detectors take seconds to import
        from distssl.downstream.detect import Detect

        return Detect
    return {"finetune": Finetune, "segment": Segment, "depth": Depth, "keypoints": Keypoints}[task]


def kind(task: str) -> str:
    """The kind of labels a task learns from."""
    return labels.LABEL if task in config.FROZEN_TASKS else network(task).kind


def check(task: str, run: Run, data: Labelled) -> Facts | None:
    """What a network trained for the task must know of the labels; None of a task that trains none.

    Raises ConfigError where the labels are wrong.
    """
    if task not in config.FITTED_TASKS:
        return None
    chosen = network(task)
    facts = chosen.facts_of(data, run.eval.num_classes)
    for dataset, ids in data.parts:
        chosen.annotations(dataset, ids)
    return facts


def labelled(run: Run, train: Dataset, test: Dataset | None, kind: str) -> Labelled:
    """The labels of a kind that a run is judged by.

    Raises ConfigError where there are none, where the method has learnt from them, or where the test images are the
    training images: every query of kNN would find itself.
    """
    key = "eval.source" if run.eval.source else "data.source"
    if _has_learnt(run, kind):
        raise ConfigError(f"eval.test_source: {_unseen(kind)} are right")
    if test is not None and test.fingerprint == train.fingerprint:
        raise ConfigError(
            f"eval.test_source={run.eval.test_source}: has the images of {key}; leave it out, and a fifth of those is "
            "held out for the test, or name others"
        )
    return labels.find(train, test, kind, name(run), key)


def name(run: Run) -> str:
    """Of the labelled images, in tables."""
    return config.plain_name(run.eval.source or run.data.source)


def batches(run: Run, tasks: Sequence[str]) -> set[int]:
    """Images a step of the networks that an evaluation on tasks trains, where there are labels enough."""
    fitted = _fitted(run.eval.backbones or BACKBONES, tasks)
    return {network(task).recipe.asked(run.eval.fit).batch for task in fitted}


def check_batches(run: Run, train: Dataset, test: Dataset | None, world_size: int) -> None:
    """Raises ConfigError where the workers cannot share the batches of the networks that the end of a run trains."""
    for task in _fitted(run.eval.backbones or (), run.eval.tasks):
        if run.eval.source or labels.has(train, kind(task)):
            data, recipe = labelled(run, train, test, kind(task)), network(task).recipe.asked(run.eval.fit)
            by_few = task in WITH_FEW_LABELS and task in run.eval.tasks  # a supervised backbone learns from all
            for how_many in run.eval.labels if by_few else (None,):
                fit.batch_of(recipe, len(few(data, kind(task), how_many, 0)), world_size)


def _fitted(backbones: Sequence[str], tasks: Sequence[str]) -> set[str]:
    """The tasks that networks are trained for; features of a supervised backbone are of one that was."""
    supervised = {"finetune"} if "supervised" in backbones else set()
    return supervised.union(tasks).intersection(config.FITTED_TASKS)


def missing(run: Run, sets: Sequence[Dataset], kind: str) -> str | None:
    """What would be right where there are no labels of a kind, to train and to test on."""
    if not all(labels.has(each, kind) for each in sets):
        return labels.WHERE[kind]
    return _unseen(kind) if _has_learnt(run, kind) else None


def _unseen(kind: str) -> str:
    return f"{'masks' if kind == 'mask' else 'labels'} that the method does not learn from"


def _has_learnt(run: Run, kind: str) -> bool:
    """Whether the method learns from the labels of this kind that the test is of."""
    chosen = method.find(run.method.name)
    if kind == "mask" and chosen.reads_masks(chosen.Config(**run.method.options)):  # from those held out of them too
        return plan.is_test(run, run.data.source) or plan.is_tested_on(run, run.data.source)
    learns = kind == labels.LABEL and chosen.learns_from_labels
    return learns and plan.is_test(run, run.data.labelled or run.data.source)


def require_names(run: Run, name: str, learnt: Place, train: Place | None, test: Place | None) -> None:
    """Raises ConfigError where the labels that a method learns from, `name`, are those it is judged by under others.

    Names are what tells that it has learnt from them. learnt, train, test: where the datasets lie.
    """
    if test == learnt and not plan.is_test(run, name):
        raise ConfigError(f"eval.test_source={run.eval.test_source}: is {name}, whose labels the method learns from")
    if train == learnt and test is None and not plan.is_tested_on(run, name):
        raise ConfigError(f"eval.source={run.eval.source}: is {name} under another name; say the same of both")


def few(data: Labelled, kind: str, how_many: int | str | None, seed: int) -> np.ndarray:
    """The training ids that a value of eval.labels chooses; as `labels.few`."""
    classes = data.train.rows(data.train_ids).label if kind == labels.LABEL else np.zeros(len(data.train_ids))
    return labels.few(data.train_ids, classes, how_many, seed)
