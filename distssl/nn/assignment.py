"""The nearest of k centroids for each row: exact, at nearly the rate of the matrix product it needs.

    argmin_j |x - c_j|^2 - 2 w_j  =  argmax_j  x.c_j - |c_j|^2 / 2 + w_j        w_j = 0 but for balanced clusters

The scores on the right are a matrix product, made tile by tile so that they are reduced while they are in cache.
Rounded scores decide where they can. Where the best two are closer than rounding could move them, distances of float64
decide, and of equal ones the lower centroid: so a label depends on its row and the centroids alone, not on how rows
are cut into tiles or spread over ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 1024  # centroids, with 512 or 1024 rows: their scores, 2 or 4 MB, stay in the last cache
GROUP = 64  # torch's amax over an inner dimension is ten times faster where it is a multiple of 32
SETTLED_AT_ONCE = 2**22  # float64 numbers


class Nearest(NamedTuple):
    """labels int64 [n]; best [n], their scores; rivals [n, groups], the best score of each group's other centroids.

    A rival of infinity stands where two centroids were so close that no bound follows.
    """

    labels: Tensor
    best: Tensor
    rivals: Tensor


class Scorer:
    """Scores rows against fixed centroids [k, D], with weights float64 [k] or none.

    group: so many consecutive centroids have one rival in `nearest`, 64 times a power of two and at most TILE; None
    where rivals are of no interest, which is 3 % faster.
    """

    def __init__(self, centroids: Tensor, weights: Tensor | None = None, group: int | None = None) -> None:
        self.centroids = centroids
        self.weights = weights
        self.num_clusters, self.dim = centroids.shape
        if group is None:
            self.group = self.tile = -(-self.num_clusters // -(-self.num_clusters // TILE))
        else:
            self.group = min(group, -(-self.num_clusters // 32) * 32)
            self.tile = TILE // self.group * self.group
        self.num_groups = -(-self.num_clusters // self.group)
        offsets = centroids.double().square().sum(1) / -2
        offsets = (offsets if weights is None else offsets + weights).to(centroids.dtype)
        # Padding: zeros with an offset that never wins, so that every tile is a whole number of groups.
        width = self.num_groups * self.group
        self.padded = centroids.new_zeros(width, self.dim)
        self.padded[: self.num_clusters] = centroids
        self.offsets = centroids.new_full((width,), -torch.inf)
        self.offsets[: self.num_clusters] = offsets
        self.rows_at_once = 512 if width <= self.tile else 1024
        self.buffer = centroids.new_empty(self.rows_at_once * min(width, self.tile))
        self.reach = float(torch.linalg.vector_norm(centroids, dim=1).max())
        self.height = float(offsets.abs().max())

    def slack(self, squares: Tensor) -> Tensor:
        """How far rounding can move the difference of two scores of rows of squared length `squares` [n]: [n].

        The dot product's classical bound (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
        """
        unit = torch.finfo(squares.dtype).eps / 2
        return 2.02 * (self.dim + 4) * unit * (squares.sqrt() * self.reach + self.height)

    def of_group(self, x: Tensor, number: int) -> Tensor:
        """Scores [n, group] of x [n, D] for the centroids of one group; valid until the next call of any method."""
        part = slice(number * self.group, (number + 1) * self.group)
        if self.buffer.numel() < len(x) * self.group:
            self.buffer = x.new_empty(len(x) * self.group)
        scores = self.buffer[: len(x) * self.group].view(len(x), -1)
        return torch.addmm(self.offsets[part], x, self.padded[part].T, out=scores)

    def nearest(self, x: Tensor, squares: Tensor) -> Nearest:
        """Of rows x [n, D] with squared lengths `squares` [n], any n; a few thousand at once are fastest."""
        found = [self._nearest(part) for part in x.split(self.rows_at_once)]
        labels, best, second, rivals = (torch.cat(part) for part in zip(*found, strict=True))
        least = best - self.slack(squares)
        close = (second >= least).nonzero()[:, 0]
        for part in close.split(self.rows_at_once):
            labels[part] = self._settle(x[part], least[part])
            rivals[part] = torch.inf
        return Nearest(labels, best, rivals)

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As rounded scores have it: labels, their scores, the second best scores [n], and rivals [n, groups]."""
        rivals = x.new_empty(len(x), self.num_groups)
        labels, best = self._of_tile(x, 0, rivals)
        second = rivals[:, : self.tile // self.group].amax(1)
        for first in range(self.tile, len(self.padded), self.tile):
            winner, top = self._of_tile(x, first, rivals)
            wins = top > best
            # Each tile's best was left out of its group's rivals; the one of the two that loses here is a rival.
            loser, lost = torch.where(wins, best, top), torch.where(wins, labels, winner)
            rivals.scatter_reduce_(1, lost[:, None] // self.group, loser[:, None], "amax")
            others = rivals[:, first // self.group : (first + self.tile) // self.group].amax(1)
            second = torch.maximum(torch.maximum(second, loser), others)
            labels = torch.where(wins, winner, labels)
            best = torch.maximum(best, top)
        return labels, best, second, rivals

    def _of_tile(self, x: Tensor, first: int, rivals: Tensor) -> tuple[Tensor, Tensor]:
        """The best centroid [n] of a tile and its score [n]; the scores of its groups' others go to `rivals`."""
        tile = slice(first, min(first + self.tile, len(self.padded)))
        scores = self.buffer[: len(x) * (tile.stop - first)].view(len(x), -1)  # [n, tile]
        torch.addmm(self.offsets[tile], x, self.padded[tile].T, out=scores)
        winner = _argmax(scores)[:, None]  # [n, 1]
        top = scores.gather(1, winner)
        scores.scatter_(1, winner, -torch.inf)
        others = rivals[:, first // self.group : tile.stop // self.group]
        torch.amax(scores.view(len(x), -1, self.group), 2, out=others)
        return winner[:, 0] + first, top[:, 0]

    def _settle(self, x: Tensor, least: Tensor) -> Tensor:
        """The labels [n] of rows x [n, D] by float64, among the centroids whose score is `least` [n] or more."""
        scores = torch.addmm(self.offsets, x, self.padded.T)  # [n, k and padding]
        row, centroid = (scores >= least[:, None]).nonzero().T  # [pairs] each
        at_once = max(1, SETTLED_AT_ONCE // self.dim)
        pairs = zip(row.split(at_once), centroid.split(at_once), strict=True)
        distance = torch.cat([(x[r].double() - self.padded[c].double()).square().sum(1) for r, c in pairs])
        if self.weights is not None:
            distance -= 2 * self.weights[centroid]
        shortest = distance.new_full((len(x),), torch.inf).scatter_reduce_(0, row, distance, "amin")
        first = torch.full((len(x),), self.num_clusters, device=x.device)
        tied = distance == shortest[row]
        return first.scatter_reduce_(0, row[tied], centroid[tied], "amin")


def _argmax(scores: Tensor) -> Tensor:
    """[n, k] -> int64 [n]. On a CPU numpy's is 13 times torch's speed, whose cost is a third of the product's."""
    return torch.from_numpy(scores.numpy().argmax(1)) if scores.device.type == "cpu" else scores.argmax(1)
