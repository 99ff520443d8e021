"""Heads that sit on a backbone's features: projectors and predictors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from distssl.nn.precision import full_precision


def mlp(
    dims: Sequence[int], *, norm: bool = True, last_norm: bool = False, last_affine: bool = True, last_bias: bool = True
) -> nn.Sequential:
    """[N, dims[0]] -> [N, dims[-1]]: Linear, BatchNorm, ReLU for each hidden width, then a Linear.

    `norm` is BatchNorm after the hidden layers, `last_norm` after the last one too, `last_affine` whether that one has
    a weight and a bias. A Linear before a norm has no bias, for the norm would remove it; `last_bias` is the last
    Linear's where no norm follows. SimCLR's projector is mlp([D, D, 128], last_norm=True), SimSiam's
    mlp([D, D, D, D], last_norm=True, last_affine=False). Raises ValueError for fewer than two widths.
    """
    if len(dims) < 2:
        raise ValueError(f"an mlp needs at least two widths, got {list(dims)}")
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(dims[:-1]):
        layers.append(nn.Linear(before, after, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(after))
        layers.append(nn.ReLU(inplace=True))
    layers.append(nn.Linear(dims[-2], dims[-1], bias=last_bias and not last_norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(dims[-1], affine=last_affine))
    return nn.Sequential(*layers)


@full_precision
def cosines(x: Tensor, prototypes: Tensor) -> Tensor:
    """[N, D] and unit rows [K, D] -> the cosines [N, K], in float32 at least: a small temperature follows."""
    return F.normalize(x, dim=1) @ prototypes.T
