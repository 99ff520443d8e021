"""Rows to cluster, for the tests of k-means."""

from __future__ import annotations

import torch
from torch import Tensor


def overlapping(rows: int, dim: int, sources: int, noise: float = 0.6, seed: int = 0) -> Tensor:
    """Blobs that overlap, float32 [rows, dim], in an order: what one rank holds looks unlike what the next does."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(sources, dim, generator=generator)
    blob = torch.randint(sources, (rows,), generator=generator).sort().values
    return means[blob] + noise * torch.randn(rows, dim, generator=generator)
