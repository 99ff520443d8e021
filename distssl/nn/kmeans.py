"""k-means over all ranks: Lloyd's algorithm, exact, and the same result at every number of ranks.

Each rank holds some of the rows. An iteration reads them once; k * (D + 1) + 1 numbers travel (`cluster_sums`).
Labels and centroids are functions of the rows, their ids and the seed alone, bit for bit: starts are drawn by row id
(`kmeans_start`), sums are exact (`cluster_sums`), and near ties are decided in float64 (`assignment`).

    found = kmeans.fit(features, k=1000, seed=epoch, ids=sample_ids)       # on every rank, with its own rows
    found.labels                                                           # of this rank's rows, in their order

Lloyd, Least Squares Quantization in PCM, IEEE Trans. Information Theory 28, 1982,
https://doi.org/10.1109/TIT.1982.1056489.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distssl.nn import balance, bounds, cluster_sums, kmeans_start, rows
from distssl.nn.assignment import Scorer
from distssl.nn.bounds import Bounds
from distssl.nn.cluster_sums import ClusterSums
from distssl.nn.rows import Rows, Source, Survey

AT_ONCE = 16384  # rows whose bounds are looked at together: fewer cost more calls, more leave the cache


@dataclass(frozen=True)
class KMeans:
    """centroids [k, D]; labels int64 [N] of this rank's rows, the nearest of these centroids; what all ranks share:

    objective: the sum over all rows of |x - its centroid|^2. sizes: int64 [k], rows a cluster. num_iterations: how
    often centroids were computed. num_refilled: empty clusters refilled on the way. converged: no row would change.
    """

    centroids: Tensor
    labels: Tensor
    objective: float
    sizes: Tensor
    num_iterations: int
    num_refilled: int
    converged: bool


def fit(
    x: Source,
    k: int,
    iterations: int = 20,
    seed: int = 0,
    init: str | Tensor | None = None,
    *,
    ids: Any = None,
    spherical: bool = False,
    balanced: bool = False,
    skip: bool = True,
    progress: Callable[[int, int, float], None] | None = None,
) -> KMeans:
    """Cluster the rows of all ranks into k clusters. Every rank calls it, with its own rows.

    x: this rank's rows, float [N, D], N as it likes, 0 included: a tensor, an array, a memory-mapped file or a callable
    that gives blocks (`rows`). k: clusters. iterations: at most; fewer where no row changes its cluster any more.
    init: "k-means++" (the default), "random", or centroids [k, D], the same on every rank.
    ids: int64 [N], unlike any other row's on any rank; by default rows are numbered through the ranks. The start is
    drawn by id, so with the same ids it does not matter which rank holds which row.
    spherical: centroids of unit length, compared by product. Rows are taken as they are; unit rows are usual.
    balanced: clusters of nearly equal size (`balance`). skip: pass over what cannot have changed (`bounds`); the result
    is the same. progress: called after each iteration with its number, `iterations`, and the objective.

    Empty clusters take halves of the largest (`cluster_sums.refill`). Raises ValueError, on every rank, for a k that
    is not in 1 .. rows, or above the number of distinct rows; NaN or infinite rows; a wrong init or ids.
    """
    source = Rows(x)
    found = rows.survey(source)
    rows.agree(lambda: _check(found, k, iterations, init, ids))
    like = found.squares
    if isinstance(init, Tensor):
        start = init.detach().to(like)
    else:
        numbers = found.first_id + np.arange(found.num_rows) if ids is None else _array(ids)
        start = kmeans_start.draw(init or kmeans_start.STARTS[0], source, numbers, k, seed, found.dim, like.dtype)
        start = start.to(like.device)
    lloyd = _Lloyd(source, found, start, seed, spherical, balanced, skip)
    return lloyd.run(iterations, progress)


def assign(x: Source, centroids: Tensor) -> Tensor:
    """The nearest of centroids [k, D] for each of this rank's rows [N, D]: int64 [N]. No collective."""
    labels, scorer = rows.Column(), None
    for block in Rows(x).blocks():
        if scorer is None:
            scorer = Scorer(centroids.detach().to(block))
        for part in block.split(AT_ONCE):
            labels.extend(scorer.nearest(part, rows.squared_lengths(part)).labels)
    return labels.all().long()


class _Lloyd:
    """One run: the rows, the centroids, and what is known of each row."""

    def __init__(
        self, source: Rows, found: Survey, start: Tensor, seed: int, spherical: bool, balanced: bool, skip: bool
    ) -> None:
        self.source, self.found, self.seed, self.spherical = source, found, seed, spherical
        self.centroids = F.normalize(start, dim=1) if spherical else start
        self.weights = start.new_zeros(len(start), dtype=torch.float64) if balanced else None
        self.labels = start.new_full((found.num_rows,), -1, dtype=torch.int64)
        self.sums = ClusterSums(len(start), found.dim, found.largest, found.num_all, start.device)
        self.steps = torch.full_like(start[:, 0], torch.inf)  # how far centroids moved
        self.skip = skip and not balanced
        self.group = bounds.group_size(found.num_rows, len(start), start.element_size()) if self.skip else None
        self.bounds = Bounds(found.num_rows, Scorer(start, group=self.group)) if self.skip else None
        self.num_refilled = 0
        self.splits: list[tuple[int, int]] = []  # of the last update: refilled cluster, its donor
        self.alike: dict[int, int] = {}  # clusters that could not be split, at that size: their rows are all alike

    def run(self, iterations: int, progress: Callable[[int, int, float], None] | None) -> KMeans:
        sums, sizes, num_moved = self.assign()
        if (sizes == 0).any():
            self.check_distinct()
        objective = self.objective(sums, sizes)
        iteration = 0
        while iteration < iterations and (num_moved or len(self.donors(sizes, objective))):
            self.update(sums, sizes, objective, iteration)
            iteration += 1
            sums, sizes, num_moved = self.assign()
            objective = self.objective(sums, sizes)
            if progress:
                progress(iteration, iterations, objective)
        return KMeans(
            self.centroids, self.labels, objective, sizes.long(), iteration, self.num_refilled, num_moved == 0
        )

    def assign(self) -> tuple[Tensor, Tensor, int]:
        """Label every row; the clusters' sums [k, D] and sizes [k] over all ranks, and how many rows moved."""
        if self.weights is not None:
            self.weights = balance.potentials(self.parts, self.centroids, self.weights, self.found)
        scorer = Scorer(self.centroids, self.weights, self.group)
        num_moved = 0
        for part, x in self.parts():
            squares, old = self.found.squares[part], self.labels[part]
            if self.bounds is None:
                new = scorer.nearest(x, squares).labels
            else:
                # A row that has no label yet has no bounds either: steps of infinity say so.
                new = self.bounds.assign(part, x, squares, old.clamp_min(0), scorer, self.steps)
            num_moved += self.sums.move(x, old, new)
            self.labels[part] = new
        return self.sums.of_all(num_moved)

    def objective(self, sums: Tensor, sizes: Tensor) -> float:
        return cluster_sums.objective(self.centroids, sums, sizes, self.found.sum_of_squares)

    def donors(self, sizes: Tensor, objective: float) -> Tensor:
        """The clusters to split in favour of empty ones, the largest first; none where no cluster is empty."""
        for pair in self.splits:
            left = [int(sizes[cluster]) for cluster in pair]
            if min(left) == 0 < max(left):
                self.alike[pair[left.index(max(left))]] = max(left)
        if sizes.all() or objective <= 0:
            return sizes.new_empty(0, dtype=torch.int64)
        able = sizes.clone()
        for cluster, size in self.alike.items():
            able[cluster] = 0 if sizes[cluster] == size else sizes[cluster]
        order = able.argsort(descending=True, stable=True)
        return order[: int((able >= 2).sum())]

    def update(self, sums: Tensor, sizes: Tensor, objective: float, iteration: int) -> None:
        """Move the centroids to their clusters' means, and those of empty ones to where there are many rows."""
        new = cluster_sums.means(sums, sizes, self.centroids, self.spherical)
        donors = self.donors(sizes, objective)
        self.splits = []
        if len(donors):
            spread = objective / self.found.num_all
            self.splits = cluster_sums.refill(new, sizes, spread, donors, self.seed, iteration)
            self.num_refilled += len(self.splits)
        if self.splits and self.spherical:
            new = F.normalize(new, dim=1)
        old, self.centroids = self.centroids, new.to(self.centroids.dtype)
        distance = torch.linalg.vector_norm(self.centroids.double() - old.double(), dim=1)
        self.steps = (distance * (1 + 1e-6)).to(old.dtype)

    def check_distinct(self) -> None:
        """More clusters than distinct rows leave some empty in every assignment, so this is asked where some are."""
        k = len(self.centroids)
        distinct = rows.num_distinct(self.source, k)
        if distinct < k:
            same = "constant features: all rows are equal" if distinct == 1 else f"x has {distinct} distinct rows"
            raise ValueError(f"k={k} clusters, but {same}; k at most {distinct} is right")

    def parts(self) -> Any:
        """(slice of this rank's rows, those rows [n, D]), n at most AT_ONCE, in order."""
        first = 0
        for block in self.source.blocks():
            for x in block.to(self.centroids.dtype).split(AT_ONCE):
                yield slice(first, first + len(x)), x
                first += len(x)


def _check(found: Survey, k: int, iterations: int, init: str | Tensor | None, ids: Any) -> None:
    if not 1 <= k <= found.num_all:
        raise ValueError(f"k={k} clusters of {found.num_all} rows on all ranks; 1 to {found.num_all} is right")
    if iterations < 1:
        raise ValueError(f"iterations={iterations}; 1 or more is right")
    if isinstance(init, Tensor):
        if init.shape != (k, found.dim) or not init.isfinite().all():
            raise ValueError(
                f"init of shape {list(init.shape)}, {int((~init.isfinite()).sum())} of it not finite; "
                f"finite centroids [{k}, {found.dim}] are right"
            )
    elif init is not None and init not in kmeans_start.STARTS:
        raise ValueError(f"init={init!r}; {', '.join(map(repr, kmeans_start.STARTS))} or a tensor is right")
    if ids is not None and (_array(ids).shape != (found.num_rows,) or _array(ids).dtype.kind not in "iu"):
        given = _array(ids)
        raise ValueError(f"ids: {given.dtype} {list(given.shape)}; integers [{found.num_rows}], one a row, are right")
    if not math.isfinite(found.sum_of_squares):
        raise ValueError("x: the sum of all squares is infinite; smaller features are right")


def _array(ids: Any) -> np.ndarray:
    return ids.cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
