"""Watches a run for what people notice after a week: a loss that is no number, collapse, a spike.

The figures are of the global batch, so every rank sees the same, at any number of workers, and does the same about it.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from distssl.errors import RunError

log = logging.getLogger(__name__)

# Ten epochs of each method on photos (benchmarks/learn.py): embedding_std was 0.41 or more, effective_rank 8 or more,
# at every line, and no gradient was above 3.4 times the median of the lines before. But DINO's, whose teacher told
# nothing apart: its bottleneck had 0.12 and 2.5.
COLLAPSED_STD = 0.1
COLLAPSED_RANK = 3.0  # images that are all black have 1.8 to 2.6: what BatchNorm makes of rounding errors
SPIKE = 10.0

IN_A_ROW = 3  # lines that must agree that the embeddings have collapsed
MOST_LINES, FEWEST_LINES = 20, 10  # that the usual gradient is the median of

REMEDY = "try a lower train.lr or a train.clip_norm"


class Guard:
    """warmup_steps: those in which a network that has hardly learned may look as if it had collapsed."""

    def __init__(self, on_collapse: Literal["warn", "stop"], warmup_steps: int, *, tells: bool) -> None:
        self.on_collapse = on_collapse
        self.warmup_steps = warmup_steps
        self.tells = tells  # one rank does
        self._num_collapsed = 0  # lines in a row
        self._norms: deque[float] = deque(maxlen=MOST_LINES)

    def require_numbers(self, step: int, figures: Mapping[str, float]) -> None:
        """Raise RunError for a loss or a gradient that is none. figures: of a line of the log."""
        for name, what in (("loss", "loss"), ("gradient_norm", "gradient's norm")):
            if not math.isfinite(figures[name]):
                raise RunError(f"the {what} is {figures[name]} at step {step}; {REMEDY}")

    def require_finite(self, step: int, module: nn.Module) -> None:
        """Raise RunError where a parameter is no number: such a state must not become a checkpoint."""
        if not torch.stack([parameter.isfinite().all() for parameter in module.parameters()]).all():
            raise RunError(f"a parameter is no number after step {step}; {REMEDY}")

    def look(self, step: int, figures: Mapping[str, float]) -> None:
        """Warn of collapse and spikes. Raises RunError where a run that has collapsed is to stop."""
        self._look_at_embeddings(step, figures.get("embedding_std", 1.0), figures.get("effective_rank", math.inf))
        self._look_at_gradient(step, figures["gradient_norm"])

    def _look_at_embeddings(self, step: int, std: float, rank: float) -> None:
        """Said once, when the lines agree."""
        collapsed = step > self.warmup_steps and (std < COLLAPSED_STD or rank < COLLAPSED_RANK)
        self._num_collapsed = self._num_collapsed + 1 if collapsed else 0
        if self._num_collapsed != IN_A_ROW:
            return
        said = f"the embeddings have collapsed at step {step}: embedding_std {std:.2g}, near 1 where they are healthy; "
        said += f"effective_rank {rank:.1f}"
        if self.on_collapse == "stop":
            raise RunError(f"{said}; {REMEDY}, or go on with train.on_collapse=warn")
        self._warn(f"{said}; {REMEDY}; train.on_collapse=stop ends such a run")

    def _look_at_gradient(self, step: int, norm: float) -> None:
        usual = statistics.median(self._norms) if len(self._norms) >= FEWEST_LINES else math.inf
        self._norms.append(norm)
        if norm > SPIKE * usual:
            self._warn(
                f"the gradient's norm is {norm:.2g} at step {step}, usually {usual:.2g}; train.clip_norm bounds it"
            )

    def _warn(self, text: str) -> None:
        if self.tells:
            log.warning("%s", text)
