"""Bytes of samples out of shards on a local or shared file system."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

MOST_OPEN = 128  # file descriptors kept open; a rank's lanes touch about as many shards at a time


class TornShardError(OSError):
    """A shard is shorter than its index says."""


class LocalStore:
    """Reads by offset with pread, from a bounded set of open files (least recently used out first)."""

    def __init__(self, shard_paths: list[Path]) -> None:
        self.shard_paths = shard_paths
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """size bytes at offset of a shard. Raises TornShardError or another OSError."""
        data = os.pread(self._descriptor(shard), size, offset)
        if len(data) != size:
            raise TornShardError(f"{len(data)} bytes at {offset} where the index says {size}")
        return data

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
