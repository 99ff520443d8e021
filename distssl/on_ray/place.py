"""Which Ray a job runs on: one started for it on this machine, or the cluster whose head this is."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from distssl.errors import ConfigError, RunError

log = logging.getLogger(__name__)

CLUSTER = "DISTSSL_CLUSTER"  # the cluster's name, in the environment of jobs that `launch.py --cluster` submits
WORKERS = "DISTSSL_WORKERS"  # beside it: `Workers` of the cluster file, as JSON
STORAGE = "DISTSSL_STORAGE"  # and where its run folders lie
HEAD_CONFIG = Path("~/ray_bootstrap_config.yaml")  # where Ray leaves the cluster file on the head
ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every line comes twice
    "PYTHONWARNINGS": "ignore:`ExecutionOptions.exclude_resources",  # Ray's own use of what it deprecates
}


@dataclass(frozen=True)
class Workers:
    """How many workers a place has room for, and what one of them takes."""

    most: int
    cpus: int
    gpus: int

    @property
    def share(self) -> dict[str, int]:
        """As Ray wants it."""
        return {"CPU": self.cpus, "GPU": self.gpus}

    def require(self, num: int, because: str) -> None:
        """Raise ConfigError where there is no room for so many. because: what the user said that asks for them."""
        if num > self.most:
            raise ConfigError(f"{because}: the cluster has room for {self.most} workers")

    def dumps(self) -> str:
        return json.dumps(asdict(self))


def on_cluster() -> bool:
    return CLUSTER in os.environ


def require_gpus(num_workers: int, because: str) -> None:
    """Raise ConfigError where this machine has GPUs, but not one for each worker: some would wait for ever.

    because: what the user said that asks for them.
    """
    import torch  # here, for the commands that only speak with a cluster do without

    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < num_workers:
        raise ConfigError(f"{because}: this machine has {num_gpus} GPUs, one a worker; at most {num_gpus} is right")


def start(workers: int | None = None, kept_cpus: int = 0) -> Workers:
    """Join the cluster, or start Ray here with room for so many workers, and on each host `kept_cpus` of other work.

    Of a cluster whose `Workers` somebody else says, the share is what it says.
    """
    os.environ |= ENVIRONMENT
    if on_cluster():
        if not ray.is_initialized():
            ray.init(address="auto", logging_level=logging.ERROR)
        return Workers(**json.loads(os.environ[WORKERS])) if WORKERS in os.environ else _of_live_nodes(kept_cpus)
    import torch

    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody preempts the machine the driver runs on
    workers = workers or 1
    cpus = max(os.cpu_count() or 1, workers + kept_cpus)
    with _address_known():
        here = ray.init(address="local", num_cpus=cpus, logging_level=logging.ERROR)
    if here.dashboard_url:
        log.info("Ray's dashboard: http://%s; its token: ray get-auth-token", here.dashboard_url)
    return Workers(workers, (cpus - kept_cpus) // workers, int(torch.cuda.is_available()))


@contextmanager
def _address_known() -> Iterator[None]:
    """Ray, started within, tells its processes where it is; Train's would look for it among all that run here."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    try:
        yield
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"], os.environ["RAY_ADDRESS"]


def beside_driver(kind: type, **options: Any) -> Any:
    """A new actor of a class, on this host: not on one that may be taken away. options: more of Ray's."""
    return ray.remote(kind).options(num_cpus=0, scheduling_strategy=on_this_host(), **options).remote()


def on_this_host() -> NodeAffinitySchedulingStrategy:
    """Where Ray is to put a task or an actor: here or nowhere."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def resource_of_this_host() -> str:
    """What Ray says that this host has one of, and no other."""
    here = ray.get_runtime_context().get_node_id()
    return next(f"node:{node['NodeManagerAddress']}" for node in ray.nodes() if node["NodeID"] == here)


def _of_live_nodes(kept_cpus: int) -> Workers:
    """A worker a GPU, or a node where there are none; of a cluster that somebody else runs."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if not nodes:
        raise RunError("no node of the cluster has a CPU to give")
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if not any(gpus):
        return Workers(len(nodes), min(share_of_cpus(node["CPU"], 1, kept_cpus) for node in nodes), 0)
    shares = [share_of_cpus(node["CPU"], gpu, kept_cpus) for node, gpu in zip(nodes, gpus, strict=True) if gpu]
    return Workers(sum(gpus), min(shares), 1)


def share_of_cpus(cpus: float, num_workers: int, kept: int) -> int:
    """The CPUs of each worker of a host that has `cpus`, of which some are kept from them."""
    return max(1, int(cpus - kept) // num_workers)
