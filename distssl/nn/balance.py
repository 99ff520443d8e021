"""Clusters of nearly equal size: weights for the centroids, found by Sinkhorn's iteration over all ranks' rows.

    q_ij ~ exp((s_ij + w_j) / epsilon), each row's sum 1;  w_j += epsilon log(N / k / sum_i q_ij)

with the scores s of `assignment`, until the q of each cluster add up to N / k; then row i goes to the largest
s_ij + w_j. One round reads the rows once and sends k numbers; the [N, k] matrix of `sinkhorn.assign`, which wants as
many rows on every rank, is never held.

Cuturi, Sinkhorn Distances, NeurIPS 2013, https://arxiv.org/abs/1306.0895, in the logarithmic form of Peyre and Cuturi,
Computational Optimal Transport, 2019, section 4.4, https://arxiv.org/abs/1803.00567.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from distssl import collectives
from distssl.nn.rows import Survey

ROUNDS = 30  # an assignment; each starts from the weights of the one before
CLOSE = 0.01  # stops when every cluster's share is within this of N / k
EPSILON = 0.02  # of the rows' variance: the smaller, the closer labels come to the soft shares
ROWS = 1024


@torch.no_grad()
def potentials(
    parts: Callable[[], Iterable[tuple[slice, Tensor]]], centroids: Tensor, weights: Tensor, found: Survey
) -> Tensor:
    """Weights w float64 [k], the same on every rank, from earlier ones. parts: this rank's rows, x [n, D] each."""
    mean_square = max(found.sum_of_squares / found.num_all, 1e-300)
    epsilon = EPSILON * mean_square
    fair = found.num_all / len(centroids)
    offsets = centroids.double().square().sum(1) / -2
    for _ in range(ROUNDS):
        shift = ((offsets + weights) / epsilon).to(centroids.dtype)
        shares = torch.zeros_like(weights)
        for _, rows in parts():
            for x in rows.split(ROWS):
                shares += torch.addmm(shift, x, centroids.T, alpha=1 / epsilon).softmax(1).double().sum(0)
        shares = collectives.sum_(shares)
        weights = weights + epsilon * (fair / shares.clamp_min(1e-300)).log()
        if (shares / fair - 1).abs().max() < CLOSE:
            break
    return weights
