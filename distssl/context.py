"""What a run needs to know of the machines: rank, device, where the run folder lies, how a checkpoint is committed.

One process, torchrun and Ray stand behind this one interface; on_ray has the third.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from distssl import collectives

Self = TypeVar("Self", bound="Context")  # typing has one from Python 3.11 on


class Context:
    """One process of a run, alone or under torchrun.

    Use as a context manager: leaving it waits for the last checkpoint.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.device = _device()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    @property
    def rank(self) -> int:
        return collectives.rank()

    @property
    def world_size(self) -> int:
        return collectives.world_size()

    def commit(self, write: Callable[[], Path], metrics: Mapping[str, float]) -> None:
        """Write a checkpoint in the background; `write` returns its folder. Every rank calls it, rank 0 writes.

        Raises what the write before this one raised.
        """
        del metrics
        if self.rank == 0:
            self.wait()
            self._pending = self._writer.submit(write)

    def wait(self) -> None:
        """Until the checkpoint committed last is on disk. Raises what its writing raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def beside(self, evaluate: Callable[[], dict[str, float]], step: int) -> bool:
        """Start an evaluation beside the training, where there is room for one; whether there is. Every rank calls it.

        `evaluate` is picklable and needs no other rank.
        """
        return False

    def evaluated(self, wait: bool = False) -> list[tuple[int, dict[str, float]]]:
        """The steps and metrics of evaluations that have ended since, or with `wait` of all; on rank 0."""
        return []

    def pending(self) -> set[int]:
        """The steps of evaluations that have not ended."""
        return set()

    def record(self, metrics: Mapping[str, float]) -> None:
        """Show metrics outside the run folder, where there is such a place (Ray's gauges)."""

    def stop_requested(self) -> bool:
        """Whether somebody asked the run to save and stop."""
        return stop_file(self.run_dir).exists()

    def preempted(self) -> bool:
        """Whether a host is about to be taken away, and no checkpoint was asked for since. Every rank calls it."""
        return False

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.wait()
        finally:
            self._writer.shutdown()


def stop_file(run_dir: Path) -> Path:
    """Its presence asks the run to save a checkpoint and stop."""
    return run_dir / ".stop"


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
