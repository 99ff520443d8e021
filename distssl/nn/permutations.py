"""Sets of permutations that are far apart: the classes of a jigsaw puzzle.

Chosen greedily: the next permutation has the largest smallest Hamming distance to those chosen before, among equals the
largest sum of distances, among equals the lowest place in lexicographic order. The first is the identity. So a set is a
function of its size alone, and a smaller set is the beginning of a larger one.

Up to k = n the smallest distance is n, for a Latin rectangle can always be given another row. Beyond, it is at least
every d with (k - 1) V(d - 1) < n!, V(r) the number of permutations within r of one (Gilbert and Varshamov's bound);
of 9 tiles it is 6 for k = 100, 5 for 701 and 1000, 4 for 2000.

Mehdi Noroozi, Paolo Favaro: Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles. ECCV 2016,
algorithm 1. https://arxiv.org/abs/1603.09246
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import math
from pathlib import Path

import numpy as np

from distssl import atomic, config
from distssl.errors import ConfigError

log = logging.getLogger(__name__)

MOST_ITEMS = 9  # 10! permutations take ten times the memory, and no published puzzle has them


@functools.cache
def far_apart(num: int, items: int, cache: Path | None = None) -> np.ndarray:
    """`num` permutations of 0 .. items - 1, uint8 [num, items], read-only; kept in the folder `cache`.

    cache: None is the folder `permutations` in machine.cache's default. What lies there is taken if its digest is
    right. Raises ConfigError where there are not as many, or more items than MOST_ITEMS.
    """
    if not 1 <= items <= MOST_ITEMS:
        raise ConfigError(f"{items} tiles: 1 to {MOST_ITEMS} have permutations that can be searched")
    if not 1 <= num <= math.factorial(items):
        raise ConfigError(
            f"method.permutations={num}: {items} tiles have {math.factorial(items)}; 1 to so many are right"
        )
    folder = cache or config.Machine().cache / "permutations"
    path = folder / f"greedy_{items}_{num}"
    try:
        found = _kept(path, num, items)
    except (ConfigError, OSError) as error:  # the choice is the same without the file, it only takes longer
        log.warning("the permutations of a jigsaw puzzle are chosen anew, for they cannot be kept: %s", error)
        found = choose(num, items)
    found.flags.writeable = False
    return found


def choose(num: int, items: int) -> np.ndarray:
    """The greedy choice, uint8 [num, items]. For 9 items: some 20 MB and a millisecond a permutation."""
    everything = _lexicographic(items)  # [items, items!]
    nearest = np.full(everything.shape[1], items, np.int64)  # to those chosen
    total = np.zeros(everything.shape[1], np.int64)
    chosen = np.empty((num, items), np.uint8)
    pick = 0
    for i in range(num):
        chosen[i] = everything[:, pick]
        distance = np.zeros(everything.shape[1], np.uint8)
        for places, item in zip(everything, chosen[i], strict=True):
            distance += places != item
        np.minimum(nearest, distance, out=nearest)
        total += distance
        pick = int(np.argmax(nearest * (num * items + 1) + total))  # the first of the best: the lowest place
    return chosen


def _lexicographic(items: int) -> np.ndarray:
    """All permutations as columns, uint8 [items, items!], contiguous in rows."""
    flat = itertools.chain.from_iterable(itertools.permutations(range(items)))
    rows = np.fromiter(flat, np.uint8, count=items * math.factorial(items)).reshape(-1, items)
    return np.ascontiguousarray(rows.T)


def _kept(path: Path, num: int, items: int) -> np.ndarray:
    """Read the file; where there is none that is whole, choose and write one, unless another process has meanwhile."""
    atomic.make_folder(path.parent)
    found = _read(path, num, items)
    if found is not None:
        return found
    with atomic.locked(path.parent):
        found = _read(path, num, items)
        if found is None:
            if path.exists():
                log.warning("%s is damaged: its permutations are chosen anew", path)
            found = choose(num, items)
            with atomic.replacing(path) as part:
                part.write_bytes(hashlib.sha256(found.tobytes()).digest() + found.tobytes())
    return found


def _read(path: Path, num: int, items: int) -> np.ndarray | None:
    """What the file holds; None where there is none or it is damaged."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    if len(data) != 32 + num * items or hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    return np.frombuffer(data[32:], np.uint8).reshape(num, items).copy()
