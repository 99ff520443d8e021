"""What a run needs to know of the machines: rank, device, where the run folder lies, how a checkpoint is committed.

One process, torchrun and Ray stand behind this one interface; on_ray has the third.
"""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from distssl import atomic, collectives
from distssl.mirror import Mirror

PLACE = ".place"  # in the run folder: a number by which ranks know whether they see the same one

Self = TypeVar("Self", bound="Context")  # typing has one from Python 3.11 on


class Context:
    """One process of a run, alone or under torchrun.

    Use as a context manager: leaving it waits for the last checkpoint. `mirror` is there where the run folder
    lies at a URL and `run_dir` is this node's working copy of it.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.mirror: Mirror | None = None
        self.device = _device()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    @property
    def rank(self) -> int:
        return collectives.rank()

    @property
    def world_size(self) -> int:
        return collectives.world_size()

    @functools.cached_property
    def node(self) -> str:
        """The same for the ranks that see the same run folder, and for no others, in every run on it."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        place = self.run_dir / PLACE
        if not place.exists():
            ours = place.with_name(f"{PLACE}.{uuid.uuid4()}")
            ours.write_text(str(uuid.uuid4()))
            with contextlib.suppress(FileExistsError):  # another rank was first
                os.link(ours, place)
            ours.unlink()
        return place.read_text()

    @functools.cached_property
    def nodes(self) -> list[str]:
        """`node` of every rank. Every rank asks for it at the same place."""
        return collectives.gather_objects(self.node) if self.world_size > 1 else [""]

    @property
    def shares_run_dir(self) -> bool:
        """Whether all ranks see the same run folder."""
        return len(set(self.nodes)) == 1

    @property
    def first_of_node(self) -> bool:
        """Whether this is the lowest rank of those that see the same run folder."""
        return self.nodes.index(self.nodes[self.rank]) == self.rank

    @contextlib.contextmanager
    def one_writer(self, folder: Path) -> Iterator[None]:
        """Hold the lock of a folder in the run folder, made where it is not there, on every node. Every rank calls it.

        Nodes come in the same order in every run, so that no two runs wait for each other.
        """
        with contextlib.ExitStack() as locks:

            def lock(node: str) -> None:
                if self.first_of_node and self.nodes[self.rank] == node:
                    atomic.make_folder(folder)
                    locks.enter_context(atomic.locked(folder))

            for node in sorted(set(self.nodes)):  # for as long as another run holds it
                collectives.patiently(functools.partial(lock, node))
            yield

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

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show metrics outside the run folder, where there is such a place (Ray's gauges)."""

    def stop_requested(self) -> bool:
        """Whether somebody asked the run to save and stop."""
        return stop_file(self.run_dir).exists()

    def preempted(self) -> bool:
        """Whether a host is about to be taken away, and the run has to save and stop. Every rank calls it."""
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
