"""When the ranks look whether they are to stop: at every line of the log, and between two of them by time.

All ranks have to stop at the same step, so they look at steps that all of them know: at each look rank 0 says, from the
time that steps take, how many steps later the next is due.
"""

from __future__ import annotations

import time

import torch

from distssl import collectives
from distssl.context import Context

EVERY_S = 5.0  # torchrun gives its ranks 30 s to save and stop, a spot notice 120 s


def asked(context: Context) -> bool:
    """Whether somebody asked the run to stop, as rank 0 knows it. Every rank calls it."""
    return collectives.broadcast_object(context.rank == 0 and context.stop_requested())


class Lookout:
    """Looks about every EVERY_S seconds, after each step where that takes longer. step: optimiser steps done."""

    def __init__(self, context: Context, step: int) -> None:
        self.context = context
        self.due = step + 1  # the step to look after, the same on every rank
        self._last = step, time.perf_counter()

    def look(self, step: int) -> bool:
        """Whether somebody asked the run to stop, or a host goes. Every rank calls it after the same steps."""
        before, started = self._last
        self._last = step, time.perf_counter()
        ahead = max(1, int(EVERY_S * (step - before) / (self._last[1] - started)))
        of_rank_0 = [self.context.stop_requested(), ahead] if self.context.rank == 0 else [0, 0]
        stop, ahead = collectives.sum_(torch.tensor(of_rank_0, dtype=torch.float64)).tolist()
        self.due = step + int(ahead)
        return bool(stop) or self.context.preempted()
