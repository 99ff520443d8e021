"""Ways to find the largest of k scores of each row: what kmeans.py --part ways compares.

Each takes rows [n, D], centroids [k, D] and how many rows to score at once, and returns labels int64 [n]; all but the
last two score with one product and an offset, and differ in how they reduce. Labels agree up to ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 40  # divides 1,000 and 10,000


def product_only(x: Tensor, c: Tensor, rows: int) -> None:
    """The bare matrix product, which no way can beat."""
    scores = x.new_empty(rows, len(c))
    for part in x.split(rows):
        torch.mm(part, c.T, out=scores[: len(part)])


def torch_argmax(x: Tensor, c: Tensor, rows: int) -> Tensor:
    return _each(x, c, rows, lambda scores: scores.argmax(1))


def two_stages(x: Tensor, c: Tensor, rows: int) -> Tensor:
    """The largest of each group of 40 neighbours, then of the groups, then in the winning group."""

    def reduce(scores: Tensor) -> Tensor:
        groups = scores.view(len(scores), -1, GROUP)
        best = groups.amax(2).argmax(1)
        within = groups[torch.arange(len(scores)), best].argmax(1)
        return best * GROUP + within

    return _each(x, c, rows, reduce)


def strided_groups(x: Tensor, c: Tensor, rows: int) -> Tensor:
    """Groups of 40 far apart, so that their largest is an elementwise maximum of rows."""

    def reduce(scores: Tensor) -> Tensor:
        groups = scores.view(len(scores), GROUP, -1)
        best = groups.amax(1).argmax(1)
        within = groups[torch.arange(len(scores)), :, best].argmax(1)
        return within * groups.shape[2] + best

    return _each(x, c, rows, reduce)


def halving(x: Tensor, c: Tensor, rows: int) -> Tensor:
    """The elementwise maximum of the left and the right half, three times; then the place among the 8 it came from."""

    def reduce(scores: Tensor) -> Tensor:
        left = scores
        for _ in range(3):
            left = torch.maximum(*left.chunk(2, 1))
        best = left.argmax(1)
        within = scores.view(len(scores), 8, -1)[torch.arange(len(scores)), :, best].argmax(1)
        return within * left.shape[1] + best

    return _each(x, c, rows, reduce)


def numpy_argmax(x: Tensor, c: Tensor, rows: int) -> Tensor:
    return _each(x, c, rows, lambda scores: torch.from_numpy(scores.numpy().argmax(1)))


def transposed(x: Tensor, c: Tensor, rows: int) -> Tensor:
    """Scores [k, rows], so that the largest of a group is an elementwise maximum; two stages."""
    half = c.square().sum(1, keepdim=True) / -2
    labels = []
    for part in x.split(rows):
        groups = torch.addmm(half, c, part.T).view(-1, GROUP, len(part))
        best = groups.amax(1).argmax(0)
        within = groups[best, :, torch.arange(len(part))].argmax(1)
        labels.append(best * GROUP + within)
    return torch.cat(labels)


WAYS = {
    "the product alone": product_only,
    "torch's argmax": torch_argmax,
    "two stages": two_stages,
    "two stages, strided groups": strided_groups,
    "two stages, transposed": transposed,
    "halving": halving,
    "numpy's argmax": numpy_argmax,
}


def _each(x: Tensor, c: Tensor, rows: int, reduce) -> Tensor:
    half = c.square().sum(1) / -2
    buffer = x.new_empty(rows * len(c))
    labels = []
    for part in x.split(rows):
        scores = buffer[: len(part) * len(c)].view(len(part), -1)
        labels.append(reduce(torch.addmm(half, part, c.T, out=scores)))
    return torch.cat(labels)
