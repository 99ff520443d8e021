"""The random numbers of an image: a counter-based hash of (seed, epoch, sample id, draw number).

No generator has a state that a crash could lose or a rank could advance too far: the n-th draw of a sample is a
function of what it is for. The hash is SplitMix64's finaliser (Steele, Lea, Flood: Fast splittable pseudorandom
number generators, OOPSLA 2014, https://doi.org/10.1145/2660193.2660195), chained over the words of the key.
"""

# DALI's type stubs lack its enums and know no pipeline without a GPU.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import math
from typing import Any

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(*words: Any) -> np.ndarray:
    """Hash words, each an int or an int array that broadcasts with the others, to uint64 of their common shape."""
    state = np.uint64(0)
    with np.errstate(over="ignore"):
        for word in words:
            state = _finalise((state ^ np.asarray(word).astype(np.uint64)) + GOLDEN)
    return np.asarray(state)


def _finalise(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: int, epoch: int | np.ndarray, ids: np.ndarray, n: int) -> np.ndarray:
    """The first n draws of each sample: float32 [len(ids), n] in [0, 1), multiples of 2**-24.

    ids: int64 [N]. epoch: of all, or int64 [N]. A pure function of its arguments: a row depends on its own id alone.
    """
    rows = hash64(seed, epoch, ids)[:, None]  # [N, 1]
    bits = hash64(rows, np.arange(n))  # [N, n]
    return (bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


class Draws:
    """Draws inside a DALI graph: each call takes the next column of the sample's uniforms.

    columns: a DataNode, float32 [columns] a sample, as many as the graph takes. Which column a call takes is fixed when
    the graph is traced, so the same code gives the same numbers whatever the batch; conditionals never skip one.
    """

    def __init__(self, columns: Any) -> None:
        self.columns = columns
        self.num_taken = 0

    def unit(self) -> Any:
        """Uniform in [0, 1)."""
        self.num_taken += 1
        return self.columns[self.num_taken - 1]

    def units(self, n: int) -> Any:
        """n draws at once, each uniform in [0, 1): [n]."""
        self.num_taken += n
        return self.columns[self.num_taken - n : self.num_taken]

    def uniform(self, low: float, high: float) -> Any:
        """Uniform in [low, high)."""
        return low + (high - low) * self.unit()

    def coin(self, probability: float) -> Any:
        """True with the given probability."""
        return self.unit() < probability

    def integer(self, n: int) -> Any:
        """Uniform in {0, ..., n - 1}, int32."""
        from nvidia.dali import fn, types
        from nvidia.dali import math as dali_math

        return fn.cast(dali_math.floor(self.unit() * float(n)), dtype=types.INT32)

    def log_uniform(self, low: float, high: float) -> Any:
        """exp of a uniform in [log low, log high)."""
        from nvidia.dali import math as dali_math

        return dali_math.exp(self.uniform(math.log(low), math.log(high)))
