"""Which samples a step sees: a pure function of (seed, epoch, step), whatever the number of workers.

Epoch e permutes the shards, lays their samples in one line and cuts the line into `lanes` equal segments; within a
lane, samples are shuffled inside windows. Step s takes the next global_batch / lanes samples of every lane, and rank
r of W owns lanes r * lanes / W to (r + 1) * lanes / W. So a rank reads few shards at a time, the global batch never
depends on W, and a position is (epoch, step). Nothing of the size of the dataset is ever held: a window is permuted
when it is reached.
"""

from __future__ import annotations

import functools

import numpy as np

from distssl.config import Run
from distssl.data import draws
from distssl.errors import ConfigError

MOST_LANES = 96
NUM_ATTEMPTS = 64  # replacements tried for one bad sample, the first half of them in its own lane


def num_divisors(n: int) -> int:
    return sum(n % d == 0 for d in range(1, n + 1))


def default_lanes(global_batch: int) -> int:
    """The divisor of global_batch, at most 96, with the most divisors of its own: the most world sizes fit it."""
    divisors = [d for d in range(1, min(global_batch, MOST_LANES) + 1) if global_batch % d == 0]
    return max(divisors, key=lambda d: (num_divisors(d), d))


def lanes_of(run: Run) -> int:
    """The lanes that a run's config means."""
    return run.data.lanes or default_lanes(run.data.global_batch)


def nearest(value: int, fits: list[int]) -> str:
    """The neighbours of value among the numbers that fit, as words for an error."""
    lower = max((f for f in fits if f < value), default=None)
    upper = min((f for f in fits if f > value), default=None)
    return " or ".join(str(f) for f in (lower, upper) if f is not None)


class Order:
    """The order of one dataset.

    shard_first: int64 [S + 1], the first sample id of each shard and, last, the number of samples.
    Raises ConfigError where the sizes do not divide one another or the dataset holds less than one global batch.
    """

    def __init__(
        self, shard_first: np.ndarray, *, seed: int, global_batch: int, lanes: int | None = None, shuffle_window: int
    ) -> None:
        self.shard_first = np.asarray(shard_first, np.int64)
        self.seed = seed
        self.global_batch = global_batch
        self.lanes = lanes or default_lanes(global_batch)
        self.shuffle_window = shuffle_window
        if global_batch % self.lanes:
            fits = [d for d in range(1, global_batch + 1) if global_batch % d == 0]
            raise ConfigError(
                f"data.lanes={self.lanes} does not divide data.global_batch={global_batch}; "
                f"nearest: {nearest(self.lanes, fits)}"
            )
        self.num_samples = int(self.shard_first[-1])
        self.per_lane = global_batch // self.lanes
        self.lane_length = self.num_samples // self.lanes
        self.steps_per_epoch = self.lane_length // self.per_lane
        self.left_out = self.num_samples - self.steps_per_epoch * global_batch
        if not self.steps_per_epoch:
            raise ConfigError(
                f"data.global_batch={global_batch} is more than the {self.num_samples} samples of the dataset; "
                f"at most {self.num_samples} can be right"
            )
        self._line = functools.lru_cache(maxsize=2)(self._permute_shards)
        # Every lane reads one window at a time, so one a lane (and its neighbour) is all that is worth keeping.
        self._window = functools.lru_cache(maxsize=2 * self.lanes)(self._permute_window)

    def batch(self, epoch: int, step: int) -> np.ndarray:
        """The global batch's sample ids, int64 [B], lane after lane."""
        return self.rank_batch(epoch, step, rank=0, world_size=1)

    def rank_batch(self, epoch: int, step: int, *, rank: int, world_size: int) -> np.ndarray:
        """The sample ids of one rank, int64 [B / W]: slice `rank` of `batch(epoch, step)`."""
        slots = np.arange(self.global_batch // world_size) + rank * (self.global_batch // world_size)
        lane, within = np.divmod(slots, self.per_lane)
        return self._ids(epoch, lane, step * self.per_lane + within)

    def replacement(self, epoch: int, step: int, slot: int, attempt: int) -> int:
        """The id that stands in for a bad sample in `slot` of the global batch, 0 <= attempt < NUM_ATTEMPTS.

        It comes from the same lane, whose shards the rank reads anyway, or where that has failed often (a lost tar
        may be a whole lane) from any. A pure function of its arguments, so that every world size and every resumed
        run replaces alike, without any record of what was replaced before.
        """
        drawn = draws.hash64(self.seed, epoch, step, slot, attempt, np.array([0xBAD, 0x1A4E]))
        position = drawn[:1] % np.uint64(self.lane_length)
        lane = drawn[1:] % np.uint64(self.lanes) if attempt >= NUM_ATTEMPTS // 2 else np.array([slot // self.per_lane])
        return int(self._ids(epoch, lane.astype(np.int64), position.astype(np.int64))[0])

    def among(self, ids: np.ndarray) -> Order:
        """The order of positions in `ids`, int64 [num_samples], ascending, of which some may be there more than once.

        Positions of one shard's samples are a shard of their own, so reads stay as local as they are here.
        """
        first = np.searchsorted(ids, self.shard_first)
        sizes = {"global_batch": self.global_batch, "lanes": self.lanes, "shuffle_window": self.shuffle_window}
        return Order(first, seed=self.seed, **sizes)

    def check_world_size(self, world_size: int) -> None:
        """Raise ConfigError where the lanes cannot be shared out evenly."""
        if self.lanes % world_size:
            fits = [d for d in range(1, self.lanes + 1) if self.lanes % d == 0]
            raise ConfigError(
                f"workers={world_size} does not divide data.lanes={self.lanes}; nearest: {nearest(world_size, fits)}"
            )

    def _ids(self, epoch: int, lane: np.ndarray, position: np.ndarray) -> np.ndarray:
        """The samples at positions of lanes, int64 arrays of one length."""
        window, within = np.divmod(position, self.shuffle_window)
        ids = np.empty(len(position), np.int64)
        for key in np.unique(np.stack([lane, window], axis=1), axis=0):
            here = (lane == key[0]) & (window == key[1])
            ids[here] = self._window(epoch, int(key[0]), int(key[1]))[within[here]]
        return ids

    def _permute_window(self, epoch: int, lane: int, window: int) -> np.ndarray:
        """The sample ids of one window of a lane in their shuffled order, int64."""
        start = window * self.shuffle_window
        stop = min(start + self.shuffle_window, self.lane_length)
        line = lane * self.lane_length + np.arange(start, stop)
        keys = draws.hash64(self.seed, epoch, line)
        return self._on_the_line(epoch, line[np.argsort(keys, kind="stable")])

    def _on_the_line(self, epoch: int, line: np.ndarray) -> np.ndarray:
        """Positions on the epoch's line of samples -> sample ids."""
        shards, ends = self._line(epoch)
        nth = np.searchsorted(ends, line, side="right")
        before = np.where(nth > 0, ends[nth - 1], 0)
        return self.shard_first[shards[nth]] + line - before

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, int64 [S], and where each one's samples end on the line, int64 [S]."""
        num_shards = len(self.shard_first) - 1
        keys = draws.hash64(self.seed, epoch, np.arange(num_shards), 0x5A4D)
        shards = np.argsort(keys, kind="stable")
        return shards, np.cumsum(np.diff(self.shard_first)[shards])
