"""What adds up between two lines of the log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Window:
    """Times and mean outputs of the steps since the last reset. Outputs stay on the device until they are asked for."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._started = time.perf_counter()
        self._paused_s = 0.0
        self._scalars: list[dict[str, torch.Tensor]] = []
        self.waited_s = 0.0  # for data
        self.num_batches = 0
        self.gradient_norm = torch.tensor(0.0)  # of the global batch, in the last step
        self.outputs: dict[str, torch.Tensor] = {}  # of the last batch
        self.views: dict[str, torch.Tensor] = {}  # of the last batch

    def add(self, outputs: dict[str, torch.Tensor], views: dict[str, torch.Tensor]) -> None:
        """One batch is done."""
        self.num_batches += 1
        self.outputs, self.views = outputs, views
        self._scalars.append({name: value.detach() for name, value in outputs.items() if value.ndim == 0})

    def figures(self) -> dict[str, float]:
        """What this rank has to log: the mean of each scalar output, the gradient's norm, the share of waiting."""
        names = self._scalars[0].keys()
        means = {name: torch.stack([row[name].double() for row in self._scalars]).mean().item() for name in names}
        return means | {"data_wait": self.waited_s / self.seconds(), "gradient_norm": self.gradient_norm.item()}

    def seconds(self) -> float:
        """Wall-clock since the last reset without the pauses."""
        return time.perf_counter() - self._started - self._paused_s

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in the block is time spent waiting for data."""
        started = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in the block does not count."""
        started = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - started
