"""Means, covariances and products over the global batch, differentiable: inputs are this rank's [N, D], N at least 1.

Results are the same on every rank. Ranks may hold different numbers of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distssl import collectives


def mean(z: Tensor) -> tuple[Tensor, Tensor]:
    """The global mean of the columns [D] and the global number of rows (scalar)."""
    sums = collectives.all_reduce(torch.cat([z.sum(0), z.new_tensor([len(z)])]))  # [D + 1]
    return sums[:-1] / sums[-1], sums[-1].detach()


def covariance(z: Tensor) -> Tensor:
    """The unbiased covariance [D, D] of the columns."""
    middle, count = mean(z)
    centred = z - middle
    return collectives.all_reduce(centred.T @ centred) / (count - 1)


def standardise(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Columns of mean 0 and biased variance 1 over the global batch, [N, D]."""
    middle, count = mean(z)
    centred = z - middle
    variance = collectives.all_reduce(centred.square().sum(0)) / count  # [D]
    return centred * (variance + eps).rsqrt()


def mean_product(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the global batch of the outer products of the rows: [N, D], [N, E] -> [D, E]."""
    count = collectives.sum_(a.new_tensor([len(a)]))
    return collectives.all_reduce(a.T @ b) / count
