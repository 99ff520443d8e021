"""`Dataset`: an indexed data set, opened. A sample's id is its row number in `index.parquet`."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distssl.data import indexing
from distssl.errors import ConfigError

CACHE_BYTES = 256 << 20  # of row groups: 44 bytes a row, so about 6 million rows
NUMBERS = ("offset", "size", "height", "width", "label", "mask_offset", "mask_size")
PLACES = ("offset", "size", "mask_offset", "mask_size")  # in bytes: int64


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where N samples lie and what is known of them; all [N].

    `shard`, `offset` and `size` (bytes) are int64, and so are the mask's (size 0: none); `height` and `width` (pixels,
    upright) and `label` (-1: none) int32.
    """

    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    height: np.ndarray
    width: np.ndarray
    label: np.ndarray
    mask_offset: np.ndarray
    mask_size: np.ndarray


class Dataset:
    """Open one with `Dataset.open(folder)`. Threads may share it; it reads row groups when they are asked for.

    `shard_first` int64 [S + 1]: the first id of each shard, and the number of samples at the end. `shard_paths` are
    absolute; `shard_bytes` int64 [S] and `shard_sha256` are what a copy of a shard must have.
    """

    def __init__(self, folder: Path, description: dict, file: pq.ParquetFile, cache_bytes: int) -> None:
        shards = description["shards"]
        self.folder = folder
        self.fingerprint: str = description["fingerprint"]
        self.classes: tuple[str, ...] = tuple(description["classes"])
        self.num_samples: int = description["samples"]
        self.num_labelled: int = description["labelled"]
        self.num_masks: int = description["masks"]
        self.shard_paths: list[Path] = [folder / shard["path"] for shard in shards]
        self.shard_sha256: tuple[str, ...] = tuple(shard["sha256"] for shard in shards)
        self.shard_bytes = np.array([shard["bytes"] for shard in shards], np.int64)
        self.shard_first = np.concatenate([[0], np.cumsum([shard["samples"] for shard in shards])]).astype(np.int64)
        self._file = file
        self._lock = threading.Lock()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: collections.OrderedDict[int, dict[str, np.ndarray]] = collections.OrderedDict()

    @classmethod
    def open(cls, folder: Path | str, *, cache_bytes: int = CACHE_BYTES) -> Dataset:
        """Raises ConfigError where the folder holds no index, a damaged one or one of another version."""
        folder = Path(folder).resolve()
        again = "index it (again) with: python launch.py index URL"
        try:
            description = json.loads((folder / indexing.DATASET).read_text(encoding="utf-8"))
            if description["version"] != indexing.VERSION:
                raise ConfigError(f"{folder}: index version {description['version']}, not {indexing.VERSION}; {again}")
            file = pq.ParquetFile(folder / indexing.INDEX, memory_map=True)
            dataset = cls(folder, description, file, cache_bytes)
        except FileNotFoundError as error:
            raise ConfigError(f"{folder}: no {Path(error.filename or indexing.INDEX).name} here; {again}") from error
        except (OSError, pa.ArrowInvalid, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{folder}: the index cannot be read: {str(error).splitlines()[0]}; {again}") from error
        problem = dataset._problem()
        if problem:
            raise ConfigError(f"{folder}: {problem}; {again}")
        return dataset

    def rows(self, ids: np.ndarray) -> Rows:
        """The rows of int64 ids [N], in their order. Raises IndexError for an id outside 0 .. num_samples - 1."""
        ids = np.asarray(ids, np.int64)
        shard = self._shards(ids)
        found = {name: np.empty(len(ids), np.int64 if name in PLACES else np.int32) for name in NUMBERS}
        for group, at in _by_value(shard):
            columns = self._columns(group)
            local = ids[at] - self.shard_first[group]
            for name in NUMBERS:
                found[name][at] = columns[name][local]
        return Rows(shard=shard, **found)

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

    def labelled_ids(self, chunk: int = 1 << 20) -> np.ndarray:
        """The ids of the samples that have a label, int64, ascending; `chunk` rows are looked at at a time."""
        found = [np.empty(0, np.int64)]
        for start in range(0, self.num_samples, chunk):
            ids = np.arange(start, min(start + chunk, self.num_samples))
            found.append(ids[self.rows(ids).label >= 0])
        return np.concatenate(found)

    def _shards(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_samples):
            raise IndexError(f"ids {ids.min()} .. {ids.max()} of a data set of {self.num_samples} samples")
        return np.searchsorted(self.shard_first, ids, side="right") - 1

    def _columns(self, group: int) -> dict[str, np.ndarray]:
        with self._lock:
            columns = self._cache.pop(group, None)
            if columns is None:
                table = self._file.read_row_group(group, columns=list(NUMBERS), use_threads=False)
                columns = {name: table.column(name).to_numpy() for name in NUMBERS}
                self._cached_bytes += sum(column.nbytes for column in columns.values())
            self._cache[group] = columns  # the last used is last
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                _, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= sum(column.nbytes for column in oldest.values())
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


def _by_value(values: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(value, where it stands) of each different value; one sort for all."""
    order = np.argsort(values, kind="stable")
    different, first = np.unique(values[order], return_index=True)
    return list(zip(different.tolist(), np.split(order, first[1:]), strict=True)) if len(values) else []
