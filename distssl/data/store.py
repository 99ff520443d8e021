"""Bytes of samples out of shards: on this file system by pread, elsewhere through the node's cache of whole tars."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from distssl.config import Machine
from distssl.data import remote
from distssl.data.fetching import Traffic
from distssl.data.remote import R, RemoteStore, TornShardError
from distssl.data.transfer import Tar

MOST_OPEN = 128  # file descriptors kept open; a rank's lanes touch about as many shards at a time

__all__ = ["LocalStore", "RemoteStore", "Sharded", "TornShardError", "open_shards"]


class Sharded(Protocol):
    """What is asked of a Dataset, which is made of an index and so stands above this module."""

    shard_paths: list[Any]  # of Path, or of URLs
    shard_first: np.ndarray
    machine: Machine
    traffic: Traffic | None  # None: the shards are on this file system

    @property
    def tars(self) -> list[Tar]: ...


def open_shards(dataset: Sharded) -> LocalStore | RemoteStore:
    """The store of a dataset's shards, which reads and is not to be shared between threads."""
    if dataset.traffic is None:
        return LocalStore([Path(path) for path in dataset.shard_paths])
    return remote.RemoteStore(dataset.tars, dataset.shard_first, dataset.machine, dataset.traffic)


class LocalStore:
    """Reads by offset with pread, from a bounded set of open files (least recently used out first)."""

    def __init__(self, shard_paths: list[Path]) -> None:
        self.shard_paths = shard_paths
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """size bytes at offset of a shard. Raises TornShardError or another OSError."""
        return remote.read_at(self._descriptor(shard), offset, size)

    def ahead(self, requests: Iterator[R]) -> Iterator[R]:
        """The same requests: nothing has to be brought here before they are read."""
        return requests

    def expect(self, shards: Sequence[int]) -> None:
        """Shards that will be read, in this order; nothing to do."""

    def release(self) -> None:
        """Nothing is read for the moment; files may stay open."""

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) == MOST_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[shard] = os.open(self.shard_paths[shard], os.O_RDONLY)
        return self._open[shard]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])
