"""Jobs as this process starts them: alone, as one of torchrun's, on its own Ray, or on the head of a cluster."""

from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from distssl import collectives, config, context, job, progress, report
from distssl.config import Run
from distssl.context import Context
from distssl.data import order
from distssl.downstream import needs
from distssl.errors import ConfigError, RunError
from distssl.job import Folders
from distssl.mirror import Mirror
from distssl.on_ray import place
from distssl.run_folder import Found

T = TypeVar("T")

log = logging.getLogger(__name__)

STOPPED = 130  # the exit code of a command that was asked to stop


def pretrain(run: Run, console: Console, errors: Console) -> int:
    """Pretrain, show what came of it; the exit code."""
    workers = run.machine.workers
    if _under_torchrun():
        _say_ignored(workers, "machine.workers")
        return _pretrain_under_torchrun(run, console)
    num_workers = _num_workers(workers, [order.lanes_of(run)], f"machine.workers={workers}")
    console.print(f"preparing {run.data.source}", soft_wrap=True)
    data = job.prepare(run, num_workers or 1)
    console.print(f"run {run.run_name}, {num_workers or 'no'} Ray worker{'s' if num_workers != 1 else ''}")
    finished = False
    with progress.follow(run.run_dir, console), _ctrl_c_asks(run.run_dir, errors):
        if num_workers:
            from distssl.on_ray import pretrain as on_ray

            finished = on_ray.run(run, data, num_workers)
        else:
            with Context(run.run_dir) as alone:
                finished = job.pretrain(run, alone, data)
    if not finished:
        errors.print("stopped; the same command goes on from the last checkpoint")
        return STOPPED
    if run.run_url:  # rank 0 may be on another host
        Mirror(run.run_dir, run.run_url).pull()
    report.show(run.run_dir, console, run.run_url)
    return 0


def evaluate(found: Found, tasks: Sequence[str] | None, num_workers: int | None, console: Console) -> None:
    """Evaluate a run on tasks, or on all that its labels allow, and show what came of it.

    num_workers: of Ray; null: this process, or one of torchrun's, and on a cluster as many as it has room for.
    """
    wanted = tasks or config.TASKS
    if _under_torchrun():
        _say_ignored(num_workers, "--workers")
    elif num_workers or place.on_cluster():
        from distssl.on_ray import evaluate as on_ray

        lanes = [order.default_lanes(batch) for batch in needs.batches(found.run, wanted)]
        num_workers = _num_workers(num_workers, lanes, f"--workers {num_workers}")
        of_ray = f"{num_workers} Ray worker{'s' if num_workers != 1 else ''}"
        console.print(f"evaluating {found.place}, {of_ray}", soft_wrap=True)
        on_ray.run(found, tasks, num_workers)
        report.show(found.folder, console, found.run.run_url)
        return
    folders = functools.partial(job.folders, found.run, wanted)
    with _one_of_the_ranks(found.folder, folders, folders) as (ours, data):
        job.evaluate_run(found.run, ours, tasks, data)
        if ours.rank == 0:
            report.show(found.folder, console, found.run.run_url)


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _say_ignored(workers: int | None, key: str) -> None:
    if workers is not None and os.environ["RANK"] == "0":
        log.info("%s=%d is ignored: torchrun says how many ranks there are", key, workers)


def _pretrain_under_torchrun(run: Run, console: Console) -> int:
    """This process is one of torchrun's: rank 0 prepares, all of them train."""
    prepare, folders = lambda: job.prepare(run, collectives.world_size()), lambda: job.folders(run)
    with _one_of_the_ranks(run.run_dir, prepare, folders) as (ours, data), _torchrun_asks(ours, console):
        finished = job.pretrain(run, ours, data)
        if ours.rank == 0 and finished:
            report.show(run.run_dir, console, run.run_url)
    return 0 if finished else STOPPED


@contextmanager
def _one_of_the_ranks(
    run_dir: Path, prepare: Callable[[], object], folders: Callable[[], Folders]
) -> Iterator[tuple[Context, Folders]]:
    """This process alone, or one of torchrun's, with what it reads: rank 0 prepares, then each host has folders."""
    collectives.init()
    try:
        with Context(run_dir) as ours:
            _together(lambda: prepare() if ours.rank == 0 else None)
            yield ours, _together(folders)
    finally:
        collectives.shutdown()


def _together(call: Callable[[], T]) -> T:
    """`call()` on every rank, for as long as it takes. A mistake of one ends all of them; rank 0 says it."""
    try:
        return collectives.patiently(call)
    except (ConfigError, RunError) as error:
        if collectives.rank() == 0:
            raise
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


def _num_workers(asked: int | None, shared: Sequence[int], because: str) -> int:
    """What the user says, else what the place has room for: the most that divide each of some numbers.

    because: how the user said it. Raises ConfigError where there is no room for so many.
    """
    if place.on_cluster():
        room = place.start()
        room.require(asked or 1, because)
        most = room.most
    else:
        place.require_gpus(asked or 1, because)
        most = torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    if asked is not None:
        return asked
    return max(num for num in range(1, most + 1) if all(one % num == 0 for one in shared))


@contextmanager
def _ctrl_c_asks(run_dir: Path, errors: Console) -> Iterator[None]:
    """The first Ctrl-C asks the run to save and stop, the second ends it at once."""

    def ask(signum: int, frame: object) -> None:
        if context.stop_file(run_dir).exists():
            raise KeyboardInterrupt
        context.stop_file(run_dir).touch()
        errors.print("saving a checkpoint, then stopping; Ctrl-C again stops at once")

    with _handled(ask, signal.SIGINT), suppress(KeyboardInterrupt):  # the caller says what to do next
        yield


def _torchrun_asks(ours: Context, console: Console) -> AbstractContextManager[None]:
    """Ctrl-C, and what torchrun sends to its ranks when it is to end, ask the run to save and stop.

    Every rank is asked, perhaps twice; torchrun kills those that have not ended after 30 seconds.
    """

    def ask(signum: int, frame: object) -> None:
        if ours.rank == 0 and not ours.stop_requested():
            context.stop_file(ours.run_dir).touch()
            console.print("saving a checkpoint, then stopping")

    return _handled(ask, signal.SIGINT, signal.SIGTERM)


@contextmanager
def _handled(handler: Callable[[int, object], None], *signals: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
