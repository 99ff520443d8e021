"""A queue of the latest rows: first in, first out, the same on every rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distssl import collectives


class Queue(nn.Module):
    """Up to `size` rows [dim] of past global batches; none of a size of 0.

    `put` keeps this rank's rows until `turn`, once an optimiser step, writes those of all ranks in the order of the
    global batch: so a queue does not depend on the number of ranks, and accumulated batches go in together. What is
    put and not yet turned is lost with a crash, as is the step it belongs to.
    """

    rows: Tensor
    num_put: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("num_put", torch.zeros((), dtype=torch.int64))  # in all
        self._waiting: list[Tensor] = []

    @torch.no_grad()
    def fill(self) -> None:
        """Start full, with random unit vectors from torch's generator."""
        self.rows.copy_(F.normalize(torch.randn_like(self.rows), dim=1))
        self.num_put.fill_(len(self.rows))

    def filled(self) -> Tensor:
        """The rows there are, [M, dim] with M at most size; without order."""
        return self.rows[: int(self.num_put)]

    @torch.no_grad()
    def put(self, x: Tensor) -> None:
        """Rows of this rank, [N, dim], N the same on every rank."""
        if len(self.rows):
            self._waiting.append(collectives.gather_no_grad(x.to(self.rows.dtype)))  # [B, dim]

    @torch.no_grad()
    def turn(self) -> None:
        """Write what was put, over the oldest rows once the queue is full."""
        if not self._waiting:
            return
        x = torch.cat(self._waiting)[-len(self.rows) :]
        places = (self.num_put + torch.arange(len(x), device=x.device)) % len(self.rows)
        self.rows[places] = x
        self.num_put += len(x)
        self._waiting.clear()
