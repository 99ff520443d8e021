"""Time a training takes, and what it says meanwhile."""

from __future__ import annotations

import resource
import time

import torch

SAY_EVERY_S = 10.0


class Clock:
    """Wall-clock and CPU seconds, those of finished child processes included, of its block."""

    def __enter__(self) -> Clock:
        self._wall, self._cpu = time.perf_counter(), _cpu_s()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.wall_s, self.cpu_s = time.perf_counter() - self._wall, _cpu_s() - self._cpu


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Say:
    """A line now and then: step, loss, images a second, time left."""

    def __init__(self, title: str, total: int, batch: int) -> None:
        self.title, self.total, self.batch = title, total, batch
        self.since, self.at = time.monotonic(), None

    def line(self, step: int, loss: torch.Tensor) -> None:
        now = time.monotonic()
        self.at = step - 1 if self.at is None else self.at
        if step < self.total and now - self.since < SAY_EVERY_S:
            return
        rate = (step - self.at) / (now - self.since)
        left_s = (self.total - step) / rate
        print(
            f"{self.title}: step {step}/{self.total}, loss {loss.item():.3f}, {rate * self.batch:.0f} images/s, "
            f"{left_s // 60:.0f}:{left_s % 60:02.0f} left",
            flush=True,
        )
        self.since, self.at = now, step
