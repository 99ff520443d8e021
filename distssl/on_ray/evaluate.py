"""`evaluate` on Ray Train: the ranks of an evaluation, on a Ray started for it or on the cluster whose head this is."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import ray

from distssl import config, job, run_folder
from distssl.context import Context
from distssl.on_ray import place, workers
from distssl.run_folder import Found


def run(found: Found, tasks: Sequence[str] | None, num_workers: int) -> None:
    """As `job.evaluate_run`, by so many workers. Raises as it does, and RunError where they kept dying."""
    ready = job.folders(found.run, tasks or config.TASKS)
    try:
        share = place.start(num_workers).share
        # On a cluster each host makes its own of what it reads.
        work = functools.partial(_evaluate, found, tasks, None if place.on_cluster() else ready)
        workers.run(work, num_workers, share)
    finally:
        ray.shutdown()
    run_folder.take_figures(found)  # rank 0 may be on another host


def _evaluate(found: Found, tasks: Sequence[str] | None, ready: job.Folders | None, the_desk: Any) -> None:
    """On each worker."""
    del the_desk
    run_folder.require_on_every_host(found)
    with Context(found.folder) as context:
        job.evaluate_run(found.run, context, tasks, ready)
