"""Features of a dataset's labelled images by a frozen backbone, through the same shards and DALI graphs as training.

No rank holds all of them: each embeds its share, in batches that are the same at any number of ranks, and writes its
rows into one file in the run folder, which all of them read by blocks. Ranks that do not see the same run folder have a
file on each node, and give the others their rows. The file is named by what it is a function of (network, parameters,
dataset, ids, crop), so it is made once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distssl import atomic, collectives, method, weights
from distssl.config import Run
from distssl.context import Context
from distssl.data import augment, quarantine
from distssl.data.graph import Views
from distssl.data.loader import Loader, Request
from distssl.data.quarantine import Quarantine
from distssl.data.sample import Sample
from distssl.data.shards import Dataset
from distssl.errors import ConfigError
from distssl.nn import per_sample, precision
from distssl.nn.backbones import Backbone

Embed = Callable[[Tensor], Tensor]  # images [n, 3, S, S] -> [n, D]

BATCH_SIZE = 256
BLOCK = 8192  # rows of features looked at together
ROWS, META = "x.npy", "features.json"


@dataclass(frozen=True)
class Features:
    """ids: int64 [N], ascending. labels: int64 [N]. Row i's feature is row `at[i]` of `x`, float32 [M, D]."""

    ids: np.ndarray
    labels: np.ndarray
    x: np.ndarray  # in memory, or mapped from a file
    at: np.ndarray  # int64 [N]

    def __len__(self) -> int:
        return len(self.ids)

    def block(self, first: int, last: int) -> Tensor:
        """float32 [last - first, D]."""
        return torch.from_numpy(np.asarray(self.x[self.at[first:last]]))

    def blocks(self, size: int = BLOCK) -> Iterator[tuple[int, Tensor]]:
        """(first row, float32 [n, D]) of all rows."""
        for first in range(0, len(self), size):
            yield first, self.block(first, first + size)

    def only(self, ids: np.ndarray) -> Features:
        """Those of some ids."""
        here = np.isin(self.ids, ids)
        return replace(self, ids=self.ids[here], labels=self.labels[here], at=self.at[here])

    def mean(self) -> Tensor:
        """float32 [D]."""
        total = sum(block.sum(0, dtype=torch.float64) for _, block in self.blocks())
        return (torch.as_tensor(total) / len(self)).float()

    def all(self) -> np.ndarray:
        """float32 [N, D]. Raises ConfigError where they would take more than half of the free memory."""
        num_bytes, free = len(self) * self.x.shape[1] * self.x.itemsize, _free_memory()
        if num_bytes > free / 2:
            raise ConfigError(
                f"eval.labels: {len(self)} features take {num_bytes >> 20} MB of the {free >> 20} MB that are free; "
                "fewer labels, or the task knn, which reads them by blocks, are right"
            )
        return self.block(0, len(self)).numpy()


@dataclass(frozen=True)
class Extraction:
    """How images become features."""

    size_px: int
    crop: float
    threads: int
    max_pixels: int
    dtype: torch.dtype
    max_bad_fraction: float = 0.05  # of the images; more is a RunError
    network: str = ""  # what the backbone is beside its parameters: strides, for example

    @classmethod
    def of_run(cls, run: Run, device: torch.device, dtype: torch.dtype | None = None) -> Extraction:
        """As the config says. dtype: of the run that trains, by default what all ranks agree on; each of them calls."""
        chosen = method.find(run.method.name)
        return cls(
            size_px=run.eval.size_px or chosen.view_size_px(chosen.Config(**run.method.options)),
            crop=run.eval.crop,
            threads=run.machine.threads,
            max_pixels=run.data.max_pixels,
            dtype=dtype or precision.agreed(run.train.precision, device),
            max_bad_fraction=run.data.max_bad_fraction,
            network=run.model.untrained.model_dump_json(),
        )


def extract(
    backbone: Backbone, dataset: Dataset, ids: np.ndarray, how: Extraction, context: Context, cache: Path | None = None
) -> Features:
    """The features of ids (int64 [N], ascending). Every rank calls it.

    cache: the folder that keeps them; without one every rank holds all of them. Samples that cannot be decoded are
    named in the log and left out. Raises RunError where they are too many, or where `cache` would lack some for good
    because a tar cannot be read.
    """
    backbone.to(context.device, precision.parameter_dtype(how.dtype)).eval()
    if cache is None:
        return _in_memory(backbone, dataset, ids, how, context)
    folder = cache / _fingerprint(backbone, dataset, ids, how)
    with context.one_writer(folder):
        if not all(collectives.gather_objects((folder / META).exists())):
            _write(backbone, dataset, ids, how, context, folder)
    done = np.array(json.loads((folder / META).read_text())["ids"], np.int64)
    if not len(done):
        raise ConfigError(f"{dataset.folder}: none of its {len(ids)} labelled images can be read")
    at = np.searchsorted(ids, done)
    return Features(done, dataset.rows(done).label.astype(np.int64), np.load(folder / ROWS, mmap_mode="r"), at)


def _in_memory(backbone: Backbone, dataset: Dataset, ids: np.ndarray, how: Extraction, context: Context) -> Features:
    done, x = [np.empty(0, np.int64)], [np.empty((0, backbone.num_features), np.float32)]
    bad = Quarantine(str(dataset.folder))
    for batch, features in share(backbone, dataset, ids, how, context, bad):
        done.append(batch["id"].cpu().numpy())
        x.append(features.float().cpu().numpy())
    require_most(bad, len(ids), how)
    parts = collectives.gather_objects((np.concatenate(done), np.concatenate(x)))
    all_ids, all_x = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    return Features(all_ids, dataset.rows(all_ids).label.astype(np.int64), all_x, np.arange(len(all_ids)))


def _write(
    backbone: Backbone, dataset: Dataset, ids: np.ndarray, how: Extraction, context: Context, folder: Path
) -> None:
    """Each rank its rows; features.json is written last.

    Not through a mapping: of a file that hosts share it writes whole pages back, over what others wrote into them.
    """
    shape = len(ids), backbone.num_features
    if context.first_of_node:
        atomic.require_free(folder, shape[0] * shape[1] * 4)
        for name in (META, ROWS):  # of a node that has what another lacks; whoever reads them goes on reading those
            (folder / name).unlink(missing_ok=True)
        np.lib.format.open_memmap(folder / ROWS, "w+", np.float32, shape)
    collectives.barrier()
    done = [np.empty(0, np.int64)]
    bad = Quarantine(str(dataset.folder), lasting=True)
    with _Rows(folder / ROWS) as rows:
        for batch, features in share(backbone, dataset, ids, how, context, bad):
            done.append(batch["id"].cpu().numpy())
            rows.put(np.searchsorted(ids, done[-1]), features.float().cpu().numpy())
        mine = np.concatenate(done)
        if not context.shares_run_dir:
            _exchange(rows, np.searchsorted(ids, mine), context)
    require_most(bad, len(ids), how)
    usable = np.concatenate(collectives.gather_objects(mine))
    if context.first_of_node:
        with atomic.replacing(folder / META) as file:
            file.write_text(json.dumps({"ids": usable.tolist()}))
    collectives.barrier()


def require_most(bad: Quarantine, num: int, how: Extraction) -> None:
    """Raises RunError where too many of so many samples were bad, on whichever ranks. Every rank calls it."""
    for found in collectives.gather_objects(list(bad.entries.values())):
        bad.merge(found)
    quarantine.check_share(bad, num, num, how.max_bad_fraction, named_by="the log")


class _Rows:
    """The rows of an npy file that is there, float32 [N, D]. Leaving it brings what was put to the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Rows:
        self.file = open(self.path, "r+b", buffering=0)
        self.x = np.load(self.path, mmap_mode="r")
        return self

    def put(self, at: np.ndarray, rows: np.ndarray) -> None:
        """Write rows, float32 [n, D], to the places `at`, int64 [n]."""
        for place, row in zip(at.tolist(), rows, strict=True):
            data, start = row.tobytes(), self.x.offset + place * self.x.strides[0]
            written = 0
            with atomic.full_disk_named(self.path):
                while written < len(data):
                    written += os.pwrite(self.file.fileno(), data[written:], start + written)

    def __exit__(self, *exc_info: object) -> None:
        with self.file, atomic.full_disk_named(self.path):
            os.fsync(self.file.fileno())


def _exchange(rows: _Rows, mine: np.ndarray, context: Context) -> None:
    """Give the rows at `mine` (int64 [n]) to the files of the other nodes, BLOCK rows of all ranks at a time."""
    size = max(1, BLOCK // context.world_size)
    longest = max(collectives.gather_objects(len(mine)))
    for first in range(0, longest, size):
        at = mine[first : first + size]
        x = per_sample.of_all(torch.from_numpy(rows.x[at]).to(context.device)).cpu().numpy()
        where = per_sample.of_all(torch.from_numpy(at).to(context.device)).cpu().numpy()
        if context.first_of_node:
            rows.put(where, x)


def _free_memory() -> int:
    """Bytes that a process could take."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10


def _fingerprint(backbone: Backbone, dataset: Dataset, ids: np.ndarray, how: Extraction) -> str:
    digest = hashlib.sha256(f"{dataset.fingerprint} {how.size_px} {how.crop} {how.dtype} {how.max_pixels}".encode())
    digest.update(np.ascontiguousarray(ids).tobytes())
    digest.update(f"{weights.digest(backbone.state_dict())} {how.network}".encode())
    return digest.hexdigest()[:16]


def share(
    embed: Embed, dataset: Dataset, ids: np.ndarray, how: Extraction, context: Context, bad: Quarantine
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """This rank's share of ids (int64 [N], ascending), batch by batch: "id" and "label" int64 [n], features [n, D].

    Batches are the same at every number of ranks, so features are too. Samples that cannot be decoded go into `bad`.
    """
    mine = ids_of_rank(ids, BATCH_SIZE, context)
    for batch in batches(dataset, mine, functools.partial(_views, how), how, context, bad):
        with torch.no_grad(), precision.autocast(how.dtype, context.device):
            x = embed(batch["image"].to(precision.parameter_dtype(how.dtype)))
        yield batch, x


def ids_of_rank(ids: np.ndarray, batch_size: int, context: Context) -> np.ndarray:
    """This rank's share in whole batches, which are the same at every number of ranks."""
    num_batches = -(-len(ids) // batch_size)
    first, last = (num_batches * rank // context.world_size for rank in (context.rank, context.rank + 1))
    return ids[first * batch_size : last * batch_size]


def crops(dataset: Dataset, ids: np.ndarray, how: Extraction, context: Context) -> dict[int, Tensor]:
    """The evaluation crops of a few samples by id, [3, S, S] each, normalised; without those that cannot be decoded."""
    found = {}
    for batch in batches(dataset, ids, functools.partial(_views, how), how, context, Quarantine()):
        found |= dict(zip(batch["id"].tolist(), batch["image"].cpu(), strict=True))
    return found


def batches(
    dataset: Dataset,
    ids: np.ndarray,
    views: Views,
    how: Extraction,
    context: Context,
    bad: Quarantine,
    *,
    batch_size: int = BATCH_SIZE,
    target: str | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Views of ids in batches, without augmentation's draws changing from one call to the next."""
    loader = Loader(
        dataset,
        views,
        seed=0,
        batch_size=batch_size,
        threads=how.threads,
        device=context.device,
        max_pixels=how.max_pixels,
        quarantine=bad,
        target=target,
    )
    starts = range(0, len(ids), batch_size)
    yield from loader.batches(Request(ids[start : start + batch_size]) for start in starts)


def _views(how: Extraction, sample: Sample) -> dict[str, Any]:
    image = augment.centre_crop(sample, how.size_px, round(how.size_px / how.crop))
    return {"image": augment.normalise(image)}
