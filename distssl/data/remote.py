"""Samples out of remote tars: whole tars come into the node's cache ahead of use, and are read there by pread.

The store looks ahead in the requests it hands on, and has their tars fetched in the order of first use. A tar is pinned
while a request is read and at no other time, and a process that waits for one pins none: so processes that wait for
each other, here or in a collective, never keep each other from going on.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

from distssl.config import Machine
from distssl.data.fetching import Fetcher, Traffic, gigabytes
from distssl.data.transfer import Tar
from distssl.errors import ConfigError

LOOK_AHEAD = 512  # requests: about as many as a lane's shuffle window has steps
MOST_PINNED = 128  # file descriptors
PULLED = 8  # of them with every request, so that a run's start does not wait for all


class TornShardError(OSError):
    """A shard is shorter than its index says."""


class Asks(Protocol):
    """A request: ids int64 [N]."""

    @property
    def ids(self) -> np.ndarray: ...


R = TypeVar("R", bound=Asks)


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """size bytes at offset of an open shard. Raises TornShardError or another OSError."""
    data = os.pread(descriptor, size, offset)
    if len(data) != size:
        raise TornShardError(f"{len(data)} bytes at {offset} where the index says {size}")
    return data


class RemoteStore:
    """Reads the shards of one dataset; one thread uses it.

    tars: of each shard. shard_first: int64 [S + 1], the first id of each and the number of samples.
    """

    def __init__(self, tars: Sequence[Tar], shard_first: np.ndarray, machine: Machine, traffic: Traffic) -> None:
        self.tars = tars
        self.shard_first = shard_first
        self.machine = machine
        self.num_sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this run on this node
        self._fetcher = Fetcher(tars, machine, traffic, self.num_sharing)
        self._open: dict[int, int] = {}  # shard -> what pins it

    def ahead(self, requests: Iterator[R]) -> Iterator[R]:
        """The same requests, each handed on when it is due, while the tars of later ones are on their way.

        Raises ConfigError where the cache cannot hold the tars of one request of every process at a time.
        """
        coming: deque[tuple[R, list[int]]] = deque()
        uses: Counter[int] = Counter()  # of a shard by the requests that come, the first to be used first
        ended = False
        for nth in itertools.count():
            pulled = 0
            while not ended and (not coming or (len(coming) < LOOK_AHEAD and pulled < PULLED)):
                request = next(requests, None)
                ended, pulled = request is None, pulled + 1
                if request is not None:
                    coming.append((request, self._shards_of(request.ids)))
                    uses.update(coming[-1][1])
            if not coming:
                return
            if nth == 0:
                self._require_room(coming[0][1])
            self._fetcher.expect(list(uses))
            request, shards = coming.popleft()
            yield request
            uses.subtract(shards)
            for shard in shards:
                if not uses[shard]:
                    del uses[shard]

    def expect(self, shards: Sequence[int]) -> None:
        """Shards that will be read, in this order."""
        self._fetcher.expect(list(dict.fromkeys(shards)))

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """size bytes at offset of a shard, waiting for it where it is not here yet. Raises TornShardError.

        Raises RunError or ConfigError where the store or the disk does not give or take a tar.
        """
        if shard not in self._open:
            if len(self._open) == MOST_PINNED:
                self.release()
            descriptor = self._fetcher.pinned(shard)
            if descriptor is None:
                self.release()  # a process that waits pins nothing
                descriptor = self._fetcher.bring(shard)
            self._open[shard] = descriptor
        return read_at(self._open[shard], offset, size)

    def release(self) -> None:
        """Nothing is read for the moment: what is here may be evicted."""
        while self._open:
            os.close(self._open.popitem()[1])

    def close(self) -> None:
        """Stop fetching; a later use starts again."""
        self.release()
        self._fetcher.close()

    def _shards_of(self, ids: np.ndarray) -> list[int]:
        return np.unique(np.searchsorted(self.shard_first, ids, side="right") - 1).tolist()

    def _require_room(self, shards: Sequence[int]) -> None:
        of_one = sum(self.tars[shard].num_bytes for shard in shards)
        needed = min(of_one * self.num_sharing, sum(tar.num_bytes for tar in self.tars))
        if needed > self._fetcher.cache.num_bytes:
            each = f"{len(shards)} tars of one batch"
            of_all = each if self.num_sharing == 1 else f"{each}, in each of {self.num_sharing} processes,"
            raise ConfigError(
                f"machine.cache_gb={self.machine.cache_gb:g}: the {of_all} take {gigabytes(needed)} GB and are needed "
                f"at once; at least {gigabytes(needed)} is right, or smaller data.lanes"
            )
