"""A teacher: a copy of a network that follows it as an exponential moving average and gets no gradient."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """A copy of `student`, whose parameters move only by `follow`.

    Its BatchNorms are in the mode of the whole method, in training with statistics of their own batches, as in the
    published code of BYOL, MoCo and DINO.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def forward(self, *args: Any) -> Tensor:
        return self.net(*args)

    @torch.no_grad()
    def follow(self, student: nn.Module, momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student, over the parameters; once an optimiser step."""
        for mine, theirs in zip(self.net.parameters(), student.parameters(), strict=True):
            mine.lerp_(theirs, 1 - momentum)


def momentum(progress: float, base: float, final: float = 1.0) -> float:
    """BYOL's schedule: from `base` at progress 0 along half a cosine to `final` at progress 1."""
    return final - (final - base) * (1 + math.cos(math.pi * progress)) / 2
