"""Balanced assignments of a global batch to prototypes.

Cuturi, Sinkhorn Distances, NeurIPS 2013, https://arxiv.org/abs/1306.0895, as SwAV uses it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distssl import collectives
from distssl.nn.precision import full_precision


@torch.no_grad()
@full_precision
def assign(scores: Tensor, epsilon: float, iterations: int = 3, more: Tensor | None = None) -> Tensor:
    """Soft assignments [N, K] of this rank's rows, each summing to 1; over the global batch prototypes share equally.

    scores: [N, K] of this rank, N the same on every rank. more: [M, K] further rows that take part in the balance, the
    same on every rank, for example a queue's. epsilon: smoothness; the smaller, the harder the assignment.
    """
    everyone = collectives.gather_no_grad(scores)  # [B, K]
    if more is not None:
        everyone = torch.cat([everyone, more])
    q = ((everyone - everyone.max()) / epsilon).exp()
    for _ in range(iterations):
        q = q / q.sum(0).clamp_min(torch.finfo(q.dtype).tiny) / q.shape[1]  # prototypes share equally
        q = q / q.sum(1, keepdim=True) / q.shape[0]  # and so do images
    first = collectives.rank() * len(scores)
    mine = q[first : first + len(scores)]
    return mine / mine.sum(1, keepdim=True)
