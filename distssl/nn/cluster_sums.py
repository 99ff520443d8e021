"""Sums and sizes of clusters over all ranks, and the centroids they give: the same bits however rows are spread.

Rows are rounded to multiples of a unit so small that every sum of them is an exact float64: addition then has no order,
and a row that changes its cluster is subtracted and added without a trace. For N rows the unit is 2^-52 N times the
largest feature: 2^-32 of it for a million rows, below float32's own rounding.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from distssl import collectives
from distssl.data import draws

_SPLIT = 3  # keeps the draws apart from those of the start


class ClusterSums:
    """Running sums of this rank's rows by cluster."""

    def __init__(self, num_clusters: int, dim: int, largest: float, num_rows: int, device: torch.device) -> None:
        """largest: an upper bound on features' absolute values, num_rows: on all ranks."""
        self.sums = torch.zeros(num_clusters, dim, dtype=torch.float64, device=device)
        self.sizes = torch.zeros(num_clusters, dtype=torch.float64, device=device)
        # Adding and subtracting 1.5 * 2^52 units leaves the nearest whole number of units.
        self.shift = 1.5 * 2.0 ** math.ceil(math.log2(max(largest, 1e-300) * max(num_rows, 1)))

    def move(self, x: Tensor, old: Tensor, new: Tensor) -> int:
        """Move rows x [n, D] from clusters `old` int64 [n], -1 for none, to `new`. Returns how many moved."""
        moved = (old != new).nonzero()[:, 0]
        if not len(moved):
            return 0
        x, old, new = (x, old, new) if len(moved) == len(x) else (x[moved], old[moved], new[moved])
        whole = x.double().add_(self.shift).sub_(self.shift)
        self._add(whole, new, 1)
        had = (old >= 0).nonzero()[:, 0]
        if len(had):
            self._add(whole[had] if len(had) < len(x) else whole, old[had], -1)
        return len(moved)

    def of_all(self, num_moved: int) -> tuple[Tensor, Tensor, int]:
        """Over all ranks: sums float64 [k, D], sizes float64 [k], rows that moved. k * (D + 1) + 1 numbers travel."""
        moved = self.sizes.new_tensor([num_moved])
        total = collectives.sum_(torch.cat([self.sums.flatten(), self.sizes, moved]))
        k, dim = self.sums.shape
        return total[: k * dim].view(k, dim), total[k * dim : -1], int(total[-1])

    def _add(self, x: Tensor, labels: Tensor, sign: int) -> None:
        self.sums.index_add_(0, labels, x, alpha=sign)
        self.sizes += sign * torch.bincount(labels, minlength=len(self.sizes))


def means(sums: Tensor, sizes: Tensor, old: Tensor, spherical: bool) -> Tensor:
    """New centroids float64 [k, D]; an empty cluster, and a spherical one whose rows cancel, keeps its `old` one."""
    if spherical:
        lengths = torch.linalg.vector_norm(sums, dim=1)
        return torch.where((lengths > 0)[:, None], sums / lengths[:, None].clamp_min(1e-300), old.double())
    return torch.where((sizes > 0)[:, None], sums / sizes[:, None].clamp_min(1), old.double())


def objective(centroids: Tensor, sums: Tensor, sizes: Tensor, sum_of_squares: float) -> float:
    """The sum over all rows of |x - c|^2, c the centroid [k, D] of the row's cluster, from the clusters' sums."""
    c = centroids.double()
    return max(0.0, sum_of_squares - 2 * float((c * sums).sum()) + float((sizes * c.square().sum(1)).sum()))


def refill(
    centroids: Tensor, sizes: Tensor, spread: float, donors: Tensor, seed: int, iteration: int
) -> list[tuple[int, int]]:
    """Split large clusters into the empty ones, in place in float64 centroids [k, D]. Every rank does the same.

    The first empty cluster takes half of the first donor, and so on, one half of each: both then stand at the donor's
    centroid, apart by a little in a direction of random signs that is a function of (seed, iteration, cluster). As in
    DeeperCluster (https://github.com/facebookresearch/DeeperCluster), whose donors are random clusters. A plane through
    the mean has rows on both sides, unless the rows are all alike.

    sizes: [k]. spread > 0: the mean squared distance of a row from its centroid. donors: int64, in their order.
    Returns the pairs (refilled, donor).
    """
    # A hundredth of a feature's deviation, as a power of two: ranks that sum in another order agree on it.
    step = 2.0 ** (math.floor(math.log2(spread / centroids.shape[1]) / 2) - 6)
    pairs = list(zip((sizes == 0).nonzero()[:, 0].tolist(), donors.tolist(), strict=False))
    for cluster, donor in pairs:
        bits = draws.hash64(seed, _SPLIT, iteration, cluster, np.arange(centroids.shape[1])) >> np.uint64(63)
        apart = torch.from_numpy(bits.astype(np.float64) * 2 - 1).to(centroids.device) * step
        centroids[cluster] = centroids[donor] + apart
        centroids[donor] -= apart
    return pairs
