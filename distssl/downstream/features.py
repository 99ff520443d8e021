"""Features of a dataset's labelled images by a frozen backbone, through the same shards and DALI graphs as training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distssl import collectives, method
from distssl.config import Run
from distssl.context import Context
from distssl.data import augment, draws
from distssl.data.loader import Loader, Request
from distssl.data.quarantine import Quarantine
from distssl.data.sample import Sample
from distssl.data.shards import Dataset
from distssl.nn import precision

Embed = Callable[[torch.Tensor], torch.Tensor]  # images [n, 3, S, S] -> [n, D]

BATCH_SIZE = 256
SPLIT_SEED = 0x5EED  # of the fifth of the labels kept for the test, the same for every run


@dataclass(frozen=True)
class Features:
    """ids: int64 [N], ascending. x: float32 [N, D]. labels: int64 [N]."""

    ids: np.ndarray
    x: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Extraction:
    """How images become features."""

    size_px: int
    crop: float
    threads: int
    max_pixels: int
    dtype: torch.dtype

    @classmethod
    def of_run(cls, run: Run, device: torch.device) -> Extraction:
        """As the config says."""
        chosen = method.find(run.method.name)
        return cls(
            size_px=run.eval.size_px or chosen.view_size_px(chosen.Config(**run.method.options)),
            crop=run.eval.crop,
            threads=run.machine.threads,
            max_pixels=run.data.max_pixels,
            dtype=precision.resolve(run.train.precision, device),
        )


def split(ids: np.ndarray, test_share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Part ids into train and test by a hash of each, so that neither depends on the others."""
    test = draws.hash64(SPLIT_SEED, ids) < np.uint64(test_share * 2**64)
    return ids[~test], ids[test]


def subset(ids: np.ndarray, num: int, seed: int) -> np.ndarray:
    """num of the ids by a hash of each, ascending; a smaller subset of one seed is part of a larger one."""
    return np.sort(ids[np.argsort(draws.hash64(SPLIT_SEED, seed, ids), kind="stable")[:num]])


def extract(
    backbone: torch.nn.Module, dataset: Dataset, ids: np.ndarray, how: Extraction, context: Context
) -> Features:
    """The features of ids (int64 [N], ascending), each rank doing its share; every rank gets all of them.

    Samples that cannot be decoded are named in the log and left out.
    """
    backbone.to(context.device, precision.parameter_dtype(how.dtype)).eval()
    done_ids, done_labels, done_x = [np.empty(0, np.int64)], [np.empty(0, np.int64)], []
    for batch, x in share(backbone, dataset, ids, how, context, Quarantine()):
        done_ids.append(batch["id"].cpu().numpy())
        done_labels.append(batch["label"].cpu().numpy())
        done_x.append(x.float().cpu().numpy())
    parts = collectives.gather_objects((np.concatenate(done_ids), done_x, np.concatenate(done_labels)))
    return Features(
        np.concatenate([part[0] for part in parts]),
        np.concatenate([x for part in parts for x in part[1]]),
        np.concatenate([part[2] for part in parts]),
    )


def share(
    embed: Embed, dataset: Dataset, ids: np.ndarray, how: Extraction, context: Context, bad: Quarantine
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """This rank's share of ids (int64 [N], ascending), batch by batch: "id" and "label" int64 [n], features [n, D].

    Batches are the same at every number of ranks, so features are too. Samples that cannot be decoded go into `bad`.
    """
    num_batches = -(-len(ids) // BATCH_SIZE)
    first, last = (num_batches * rank // context.world_size for rank in (context.rank, context.rank + 1))
    mine = ids[first * BATCH_SIZE : last * BATCH_SIZE]
    for batch in _images(dataset, mine, how, context, bad):
        with torch.no_grad(), precision.autocast(how.dtype, context.device):
            x = embed(batch["image"].to(precision.parameter_dtype(how.dtype)))
        yield batch, x


def crops(dataset: Dataset, ids: np.ndarray, how: Extraction, context: Context) -> dict[int, torch.Tensor]:
    """The evaluation crops of a few samples by id, [3, S, S] each, normalised; without those that cannot be decoded."""
    found = {}
    for batch in _images(dataset, ids, how, context, Quarantine()):
        found |= dict(zip(batch["id"].tolist(), batch["image"].cpu(), strict=True))
    return found


def _images(
    dataset: Dataset, ids: np.ndarray, how: Extraction, context: Context, bad: Quarantine
) -> Iterator[dict[str, torch.Tensor]]:
    """Evaluation crops of ids in batches of BATCH_SIZE."""
    loader = Loader(
        dataset,
        functools.partial(_views, how),
        seed=0,
        batch_size=BATCH_SIZE,
        threads=how.threads,
        device=context.device,
        max_pixels=how.max_pixels,
        quarantine=bad,
    )
    starts = range(0, len(ids), BATCH_SIZE)
    yield from loader.batches(Request(ids[start : start + BATCH_SIZE]) for start in starts)


def _views(how: Extraction, sample: Sample) -> dict[str, Any]:
    image = augment.centre_crop(sample, how.size_px, round(how.size_px / how.crop))
    return {"image": augment.normalise(image)}
