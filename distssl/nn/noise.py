"""Normal noise in torch that is a function of a sample's seed: the same at any batch, on any device.

A counter-based hash, that of data/draws.py in int64 arithmetic, gives 16 bits for each number, and a table the normal
quantile in the middle of each of their 65,536 cells. Nothing is computed in floating point but the table, so there is
no rounding that could depend on where in a batch a number stands. The largest number is 4.33.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64, like the factors below: multiplication wraps around
FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
BITS = 16
LANES = 64 // BITS


def normal(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Integer seeds [N, W] -> independent standard normal numbers, float32 [N, *shape].

    A row depends on its own seed alone, and on all its words.
    """
    count = math.prod(shape)
    counters = torch.arange(-(-count // LANES), device=seeds.device)
    bits = hash64(hash64(*seeds.unbind(1))[:, None], counters)  # [N, count / LANES]
    lanes = [_shifted(bits, BITS * lane) & (2**BITS - 1) for lane in range(LANES)]
    cells = torch.stack(lanes, dim=2).flatten(1)[:, :count]  # [N, count]
    return _quantiles().to(seeds.device)[cells].unflatten(1, tuple(shape))


def hash64(*words: Tensor) -> Tensor:
    """Hash words, integer tensors that broadcast, to int64 of their common shape: the bits of draws.hash64."""
    state = torch.zeros((), dtype=torch.int64, device=words[0].device)
    for word in words:
        x = (state ^ word.long()) + GOLDEN
        x = (x ^ _shifted(x, 30)) * FACTORS[0]
        x = (x ^ _shifted(x, 27)) * FACTORS[1]
        state = x ^ _shifted(x, 31)
    return state


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by of the unsigned number: torch's int64 shift would draw the sign in."""
    return (x >> by) & ((1 << (64 - by)) - 1) if by else x


@functools.cache
def _quantiles() -> Tensor:
    """float32 [2**BITS], symmetric, scaled to variance 1."""
    middles = (torch.arange(2**BITS, dtype=torch.float64) + 0.5) / 2**BITS
    quantiles = torch.special.ndtri(middles)
    return (quantiles / quantiles.square().mean().sqrt()).float()
