"""What a job on a cluster waits for, said from time to time: workers without a host, and why the cloud gives none.

Ray keeps the cloud's reason in the log of its autoscaler alone, on the head.
"""

from __future__ import annotations

import datetime
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import ray
from ray._private import state, worker
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util import placement_group_table

from distssl import background
from distssl.on_ray import place

log = logging.getLogger(__name__)

POLL_S = 5
REPEAT_S = 120  # where nothing has changed
RECENT_S = 120  # a reason that is older may have passed
TAIL = 1 << 16  # bytes of the autoscaler's log
REFUSED = re.compile(r"^(\S+ \S+),\d+\s.*Failed to launch \d+ nodes of type (\S+): (.*)$", re.MULTILINE)
LAUNCH_ERROR = re.compile(r"^Node Launch Exception \((\w+)\)")

Resources = Mapping[str, float]


def told() -> AbstractContextManager[None]:
    """While the block runs, say what this job's workers wait for."""
    return background.beside(_tell, "waiting") if place.on_cluster() else nullcontext()


def _tell(done: threading.Event) -> None:
    waited, said, said_at = False, None, 0.0
    while not done.wait(POLL_S):
        line = _line()
        if line and waited and (line != said or time.monotonic() - said_at > REPEAT_S):
            log.info("%s", line)
            said, said_at = line, time.monotonic()
        waited = line is not None  # for longer than workers take to change


def _line() -> str | None:
    """None where no worker waits."""
    job = ray.get_runtime_context().get_job_id()  # which the ids of its groups end in
    groups = [group for name, group in placement_group_table().items() if name.endswith(job)]
    waiting = [bundle for group in groups if group["state"] == "PENDING" for bundle in group["bundles"].values()]
    num_placed = _num_placed(waiting)
    if num_placed == len(waiting):
        return None
    said = [f"waiting for workers: hosts for {num_placed} of {len(waiting)} are up"]
    num_starting = len(get_cluster_status(ray.get_runtime_context().gcs_address).pending_nodes)
    if num_starting:
        said.append(f"being set up: {num_starting}")
    return "; ".join([*said, *_refused()])


def _num_placed(bundles: list[Resources]) -> int:
    """How many of some bundles the nodes have room for."""
    draining = state.state.get_draining_nodes()
    nodes = [dict(free) for name, free in state.available_resources_per_node().items() if name not in draining]
    num = 0
    for bundle in bundles:
        free = next((node for node in nodes if all(node.get(key, 0) >= bundle[key] for key in bundle)), None)
        if free is not None:
            num += 1
            for key, value in bundle.items():
                free[key] -= value
    return num


def _refused() -> list[str]:
    """The latest reason of each type of node that could not be had."""
    assert worker._global_node
    path = Path(worker._global_node.get_logs_dir_path()) / "monitor.log"
    if not path.exists():  # nobody scales this cluster
        return []
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        tail = file.read().decode(errors="replace")
    since = datetime.datetime.now() - datetime.timedelta(seconds=RECENT_S)
    found = (match.groups() for match in REFUSED.finditer(tail))
    recent = ((kind, why) for at, kind, why in found if datetime.datetime.fromisoformat(at) > since)
    reasons = {kind: LAUNCH_ERROR.sub(r"\1", why) for kind, why in recent}
    return [f"no {kind} to be had: {why}" for kind, why in sorted(reasons.items())]
