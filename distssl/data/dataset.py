"""`Dataset`: an indexed data set, opened. A sample's id is its row number in `index.parquet`."""

from __future__ import annotations

import collections
import copy
import dataclasses
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distssl import atomic
from distssl.config import Machine
from distssl.data import annotations, fetching, indexing, locations, transfer
from distssl.data.annotations import LABEL
from distssl.data.locations import Place
from distssl.data.transfer import Tar
from distssl.errors import ConfigError

# Of row groups: 28 bytes a row, so about 9 million rows; 16 more for a kind of annotation that is asked for.
CACHE_BYTES = 256 << 20
NUMBERS = ("offset", "size", "height", "width", "label")
INDEXES = 16  # copies of remote indexes kept
AGAIN = "index it (again) with: python launch.py index URL"
TYPES = {field.name: field.type.to_pandas_dtype() for field in indexing.COLUMNS}

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where N samples lie and what is known of them; all [N].

    `shard`, `offset` and `size` (bytes) are int64; `height` and `width` (pixels, upright) and `label` (-1: none) int32.
    `annotation_offset` and `annotation_size` (0: none), int64, are by kind, for the kinds that were asked for.
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    height: np.ndarray
    width: np.ndarray
    label: np.ndarray
    annotation_offset: dict[str, np.ndarray]
    annotation_size: dict[str, np.ndarray]


class Dataset:
    """Open one with `Dataset.open(folder)`. Threads may share it; it reads row groups when they are asked for.

    `folder` is a path or a URL. `shard_first` int64 [S + 1]: the first id of each shard, and the number of samples at
    the end. `shard_paths` are absolute, or all of them URLs; `shard_bytes` int64 [S] and `shard_sha256` are what a copy
    of a shard must have, where a sha256 is None the store's `shard_tags`. `traffic` counts what came from a store, None
    where the shards are on this file system.
    """

    def __init__(
        self, folder: Place, description: dict, file: pq.ParquetFile, cache_bytes: int, machine: Machine
    ) -> None:
        shards = description["shards"]
        self.folder = folder
        self.machine = machine
        self.fingerprint: str = description["fingerprint"]
        self.classes: tuple[str, ...] = tuple(description["classes"])
        self.num_samples: int = description["samples"]
        self.num_labelled: int = description["labelled"]
        self.num_annotated: dict[str, int] = {kind: description["annotated"][kind] for kind in annotations.KINDS}
        self.shard_paths: list[Any] = [locations.join(folder, shard["path"]) for shard in shards]  # of Path or of str
        self.shard_sha256: tuple[str | None, ...] = tuple(shard["sha256"] for shard in shards)
        self.shard_tags: tuple[str | None, ...] = tuple(shard.get("etag") for shard in shards)
        self.traffic = fetching.Traffic() if any(map(locations.is_url, self.shard_paths)) else None
        self.shard_bytes = np.array([shard["bytes"] for shard in shards], np.int64)
        self.shard_first = np.concatenate([[0], np.cumsum([shard["samples"] for shard in shards])]).astype(np.int64)
        self._numbers: np.ndarray | None = None  # of the labels, where they are not those of the index
        self._file = file
        self._lock = threading.Lock()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: collections.OrderedDict[tuple[int, Names], list[np.ndarray]] = collections.OrderedDict()

    @classmethod
    def open(cls, folder: Place, machine: Machine | None = None, *, cache_bytes: int = CACHE_BYTES) -> Dataset:
        """The data set of a folder, or of a URL, whose index is then copied into machine.cache.

        Raises ConfigError where there is no index, a damaged one or one of another version, or where machine.cache_gb
        is less than a tar.
        """
        machine = machine or Machine()
        place = str(folder).rstrip("/") if locations.is_url(folder) else Path(folder).resolve()
        try:
            here = _copied(place, machine) if isinstance(place, str) else place
            description = json.loads((here / indexing.DATASET).read_text(encoding="utf-8"))
            if description["version"] != indexing.VERSION:
                raise ConfigError(f"{place}: index version {description['version']}, not {indexing.VERSION}; {AGAIN}")
            file = pq.ParquetFile(here / indexing.INDEX, memory_map=True)
            dataset = cls(place, description, file, cache_bytes, machine)
        except FileNotFoundError as error:
            raise ConfigError(f"{place}: no {Path(error.filename or indexing.INDEX).name} here; {AGAIN}") from error
        except (OSError, pa.ArrowInvalid, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{place}: the index cannot be read: {str(error).splitlines()[0]}; {AGAIN}") from error
        problem = dataset._problem()
        if problem:
            raise ConfigError(f"{place}: {problem}; {AGAIN}")
        if dataset.traffic is not None:
            fetching.require_room(dataset.tars, machine)
        return dataset

    def take_figures(self) -> dict[str, float]:
        """What there is to log of reading since the last call: nothing of shards on this file system."""
        return {"cache_hit_rate": self.traffic.take_hit_rate()} if self.traffic else {}

    @property
    def tars(self) -> list[Tar]:
        """What a store needs of each shard."""
        places = map(str, self.shard_paths)
        return list(map(Tar, places, self.shard_bytes.tolist(), self.shard_sha256, self.shard_tags))

    def rows(self, ids: np.ndarray, kinds: Sequence[str] = ()) -> Rows:
        """The rows of int64 ids [N], in their order, with the places of these kinds of annotations.

        A kind takes 0.1 to 0.14 ms for 256 ids in 32 shards, the rest 0.33 ms. Raises IndexError for an id outside
        0 .. num_samples - 1.
        """
        ids = np.asarray(ids, np.int64)
        shard = self._shards(ids)
        blocks = (NUMBERS, *(indexing.PLACES[kind] for kind in kinds))
        found: dict[str, np.ndarray] = {name: np.empty(len(ids), TYPES[name]) for block in blocks for name in block}
        for group, at in _by_value(shard):
            local = ids[at] - self.shard_first[group]
            for block in blocks:
                for name, column in zip(block, self._columns(group, block), strict=True):
                    found[name][at] = column[local]
        places = [{kind: found.pop(indexing.PLACES[kind][i]) for kind in kinds} for i in (0, 1)]
        if self._numbers is not None:
            found["label"] = self._numbers[found["label"]]
        return Rows(shard=shard, **found, annotation_offset=places[0], annotation_size=places[1])

    def numbered_as(self, classes: Sequence[str]) -> Dataset:
        """The same data set with the labels that its classes have in `classes`, by name; all of them are there."""
        number = {name: i for i, name in enumerate(classes)}
        other = copy.copy(self)
        other.classes = tuple(classes)
        other._numbers = np.array([*(number[name] for name in self.classes), -1], TYPES["label"])  # -1: none, as before
        other._cache, other._cached_bytes = collections.OrderedDict(), 0
        return other

    def keys(self, ids: np.ndarray) -> list[str]:
        """The keys of int64 ids [N]: for messages, not for every batch."""
        ids = np.asarray(ids, np.int64)
        keys = [""] * len(ids)
        for group, at in _by_value(self._shards(ids)):
            with self._lock:
                column = self._file.read_row_group(group, columns=["key"], use_threads=False).column("key")
            for i in at:
                keys[i] = column[int(ids[i] - self.shard_first[group])].as_py()
        return keys

    def ids_with(self, kind: str, chunk: int = 1 << 20) -> np.ndarray:
        """The ids of the samples with a kind of annotation, or with a label, int64, ascending.

        kind: LABEL or one of annotations.KINDS. `chunk` rows are looked at at a time.
        """
        found = [np.empty(0, np.int64)]
        for start in range(0, self.num_samples, chunk):
            ids = np.arange(start, min(start + chunk, self.num_samples))
            rows = self.rows(ids, () if kind == LABEL else (kind,))
            found.append(ids[rows.label >= 0 if kind == LABEL else rows.annotation_size[kind] > 0])
        return np.concatenate(found)

    def _shards(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_samples):
            raise IndexError(f"ids {ids.min()} .. {ids.max()} of a data set of {self.num_samples} samples")
        return np.searchsorted(self.shard_first, ids, side="right") - 1

    def _columns(self, group: int, names: Names) -> list[np.ndarray]:
        with self._lock:
            columns = self._cache.pop((group, names), None)
            if columns is None:
                table = self._file.read_row_group(group, columns=list(names), use_threads=False)
                columns = [table.column(name).to_numpy() for name in names]
                self._cached_bytes += sum(column.nbytes for column in columns)
            self._cache[group, names] = columns  # the last used is last
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                _, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= sum(column.nbytes for column in oldest)
            return columns

    def _problem(self) -> str | None:
        """What does not fit together, or None."""
        meta = self._file.metadata
        missing = {field.name for field in indexing.INDEX_SCHEMA} - set(self._file.schema_arrow.names)
        if missing:
            return f"{indexing.INDEX} has no column {', '.join(sorted(missing))}"
        ours = json.loads((self._file.schema_arrow.metadata or {}).get(indexing.META, b"{}"))
        if ours.get("fingerprint") != self.fingerprint:
            return f"{indexing.INDEX} and {indexing.DATASET} are not of one indexing"
        sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        if sizes != np.diff(self.shard_first).tolist() or self.num_samples != sum(sizes):
            return f"{indexing.INDEX} has other samples than {indexing.DATASET} says"
        return None


def _copied(url: str, machine: Machine) -> Path:
    """The folder of machine.cache with a copy of the index at `url` as it is now.

    Processes of a node take turns, also where they want other indexes: one deletes what has not been used for long.
    """
    copies = machine.cache / "indexes"
    try:
        text = transfer.read(f"{url}/{indexing.DATASET}", machine.retry_s)
        folder = copies / hashlib.sha256(url.encode() + text).hexdigest()[:24]
        atomic.make_folder(copies)
        with atomic.locked(copies):
            folder.mkdir(exist_ok=True)
            if not (folder / indexing.DATASET).exists():
                transfer.fetch(f"{url}/{indexing.INDEX}", folder / indexing.INDEX, machine.retry_s)
                with atomic.replacing(folder / indexing.DATASET) as file:
                    file.write_bytes(text)
            os.utime(folder)
            there = [each for each in copies.iterdir() if each.is_dir()]
            for old in sorted(there, key=lambda each: each.stat().st_mtime_ns)[:-INDEXES]:
                shutil.rmtree(old, ignore_errors=True)  # who has it open keeps what is open
    except transfer.RefusedError as error:
        raise ConfigError(f"{error}; {AGAIN}") from error
    return folder


def _by_value(values: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(value, where it stands) of each different value; one sort for all."""
    order = np.argsort(values, kind="stable")
    different, first = np.unique(values[order], return_index=True)
    return list(zip(different.tolist(), np.split(order, first[1:]), strict=True)) if len(values) else []
