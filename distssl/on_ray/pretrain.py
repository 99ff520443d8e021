"""The main job on Ray Train: workers that run `job.pretrain`, and what of theirs its driver shows."""

from __future__ import annotations

import functools
import json
import logging
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train
from ray.exceptions import RayActorError

from distssl import background, job, monitor
from distssl.config import Run
from distssl.context import Context
from distssl.errors import ConfigError
from distssl.on_ray import desk, place, workers
from distssl.on_ray.gauges import Gauges
from distssl.remote import Remote

log = logging.getLogger(__name__)

NOTED_EVERY_S = 1.0


class RayContext(Context):
    """A worker of a Ray Train run; Ray has set up the process group."""

    def __init__(self, run: Run, the_desk: Any, home: str) -> None:
        super().__init__(run.run_dir)
        self._desk = the_desk
        # Where the driver sees the run folder, it needs no telling.
        self._told = run.run_url is not None and home != ray.get_runtime_context().get_node_id()
        self._eval_cpus = run.machine.eval_cpus
        self._draining = False  # a node of the workers
        self._storage = train.get_context().get_storage()
        self._evaluations: dict[Any, int] = {}  # what Ray will give -> the step it is of
        self._latest: Any = None  # of those that were started
        self._gauges = Gauges(run.run_name, run.method.name)

    def commit(self, write: Callable[[], Path], metrics: Mapping[str, float]) -> None:
        if self.rank != 0:
            train.report(dict(metrics))
            return
        self._pending = written = Future[Path]()
        # Ray calls `write` in a background thread instead of copying the folder it is given, which is empty.
        train.report(
            dict(metrics),
            checkpoint=train.Checkpoint(tempfile.mkdtemp(prefix="distssl-")),
            checkpoint_upload_mode=train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=lambda _checkpoint, _name: self._write(write, written),
            delete_local_checkpoint_after_upload=True,
        )

    def _write(self, write: Callable[[], Path], written: Future[Path]) -> train.Checkpoint:
        try:
            path = write()
        except Exception as error:
            written.set_exception(error)
            if isinstance(error, ConfigError):
                desk.tell(self._desk, self.rank, error)
            raise
        written.set_result(path)
        if self.mirror is None:
            return train.Checkpoint(str(path))
        assert self._storage
        there = f"{self._storage.experiment_fs_path}/{self.mirror.name(path)}"
        return train.Checkpoint(there, self._storage.storage_filesystem)

    def stop_requested(self) -> bool:
        return super().stop_requested() or ray.get(self._desk.stop_asked.remote())

    def preempted(self) -> bool:
        self._draining = place.on_cluster() and train.get_preemption_info() is not None
        return self._draining

    def hand_over(self) -> None:
        """Where a host is about to be taken away: raise what has Ray start the workers again without it."""
        if self._draining:
            if self.rank == 0:
                self.wait()
                log.info("a host of the workers is about to be taken away: a checkpoint is saved, going on without it")
            logging.disable(logging.ERROR)  # Ray would show it with a traceback
            raise RayActorError(error_msg="a host of the workers is taken away", preempted=True)

    def beside(self, evaluate: Callable[[], dict[str, float]], step: int) -> bool:
        if self._eval_cpus is None:
            return False
        if self.rank == 0:
            # On this host, which has what it reads. It asks Ray for no CPU: its own were kept from the workers, and
            # the autoscaler would start another host for it.
            task = ray.remote(_evaluate).options(num_cpus=0, scheduling_strategy=place.on_this_host())
            self._latest = task.remote(evaluate, self._eval_cpus, self._latest)
            self._evaluations[self._latest] = step
        return True

    def evaluated(self, wait: bool = False) -> list[tuple[int, dict[str, float]]]:
        started = list(self._evaluations)
        if not started:
            return []
        # On a host that is about to be taken away there is no time for them.
        done, _ = ray.wait(started, num_returns=len(started), timeout=None if wait and not self._draining else 0)
        return [(self._evaluations.pop(found), ray.get(found)) for found in done]

    def pending(self) -> set[int]:
        return set(self._evaluations.values())

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.rank == 0:
            self._gauges.record(metrics)
            if self._told:
                self._desk.note.remote(json.dumps({"step": step, **metrics}))

    def __exit__(self, *exc_info: object) -> None:
        self._gauges.close()
        super().__exit__(*exc_info)


def _evaluate(evaluate: Callable[[], dict[str, float]], threads: int, before: object) -> dict[str, float]:
    """The whole of a task of Ray's, which starts it once there is what the one before found: one at a time."""
    del before
    torch.set_num_threads(threads)
    return evaluate()


def run(run: Run, folders: job.Folders, num_workers: int) -> bool:
    """Pretrain on a Ray started for it, or on the cluster whose head this is; False where somebody asked to stop.

    Raises ConfigError or RunError as the workers did, and RunError where they kept dying.
    """
    share = place.start(num_workers, run.machine.eval_cpus or 0).share
    try:
        _forget(run)
        the_desk = desk.open_for(run.run_name)
        home = ray.get_runtime_context().get_node_id()
        # On a cluster each host makes its own of what it reads.
        work = functools.partial(_pretrain, run, None if place.on_cluster() else folders, home)
        with _noting(the_desk, run):
            return workers.run(work, num_workers, share, the_desk, name=run.run_name, storage=str(run.machine.storage))
    finally:
        ray.shutdown()
        _forget(run)


def _pretrain(run: Run, folders: job.Folders | None, home: str, the_desk: Any) -> bool:
    """On each worker. home: the driver's node."""
    with RayContext(run, the_desk, home) as context:
        finished = job.pretrain(run, context, folders or job.folders(run))
        context.hand_over()
    return finished


def _noting(the_desk: Any, run: Run) -> AbstractContextManager[None]:
    """Write the metrics that workers elsewhere tell of into the driver's copy of the run folder."""

    def write(done: threading.Event) -> None:
        last = False
        while not last:
            last = done.wait(NOTED_EVERY_S)
            with open(run.run_dir / monitor.METRICS, "a") as file:
                file.writelines(f"{line}\n" for line in ray.get(the_desk.take.remote()))

    return background.beside(write, "notes") if run.run_url is not None else nullcontext()


def _forget(run: Run) -> None:
    """Remove what Ray notes of checkpoints: the run itself knows which there are."""
    names = ("checkpoint_manager_snapshot.json", ".validate_storage_marker")
    if run.run_url is not None:
        Remote(run.run_url).remove(*names)
    for name in names:
        (run.run_dir / name).unlink(missing_ok=True)
