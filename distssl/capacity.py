"""How many workers the hosts of a cluster file have room for: of a run, and of `plan` before there is a cluster.

Imports no Ray and asks no cloud.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationError

from distssl import prices, settings
from distssl.config import Section
from distssl.errors import ConfigError

OURS = "distssl"
OWN_HOSTS = "local"  # Ray's word for the provider of a list of hosts; here the name of their type too
PLACEHOLDER = "FILL_IN"

Resources = Mapping[str, Mapping[str, float]]  # node type -> what a host of it has, as Ray counts it


class Options(Section):
    """The `distssl:` part of a cluster file."""

    storage: str | None = Field(default=None, description="where run folders lie; every host must reach it")
    workers: PositiveInt | None = Field(default=None, description="of all hosts; null: one a GPU, one a host without")
    worker: dict[Literal["CPU", "GPU"], int] | None = Field(
        default=None, description="what one takes; null: its share of a host"
    )
    environment: dict[str, str] = Field(default={}, description="variables of jobs")


@dataclass(frozen=True)
class Capacity:
    """Of the hosts that work, all of one type. most: workers of all hosts together, `per_host` on a full one."""

    node_type: str
    num_hosts: int
    per_host: int
    most: int
    on_gpus: bool

    def on(self, num_hosts: int) -> int:
        """The most workers on so many hosts."""
        return min(num_hosts * self.per_host, self.most)


def options(tree: Mapping[str, Any], file: str) -> Options:
    """What a cluster file says for us; what is not filled in yet, it does not say. file: what a mistake begins with."""
    said = tree.get(OURS) or {}
    if isinstance(said, Mapping):
        said = {key: value for key, value in said.items() if PLACEHOLDER not in str(value)}
    try:
        return Options.model_validate(said)
    except ValidationError as error:
        mistakes = (settings.explain(Options, item, prefix=OURS) for item in error.errors())
        raise ConfigError(*(f"{file}: {mistake}" for mistake in mistakes)) from None


def of(tree: Mapping[str, Any], said: Options, resources: Resources) -> Capacity:
    """Of the worker type with most GPUs: one worker a GPU, one a host where there are none, or as many as are said.

    tree: a cluster file with worker types, or of hosts of one's own. resources: without a type, nothing is known of it.
    """
    if is_own_hosts(tree):
        node_type, num_hosts = OWN_HOSTS, 1 + len(tree["provider"].get("worker_ips") or ())
    else:
        types = worker_types(tree)
        node_type = max(types, key=lambda name: resources.get(name, {}).get("GPU", 0))
        num_hosts = _most_hosts(tree, types[node_type])
    gpus = int(resources.get(node_type, {}).get("GPU", 0))
    per_host = max(gpus, 1)
    most = said.workers or num_hosts * per_host
    per_host = max(per_host, math.ceil(most / max(num_hosts, 1)))  # where more are said than are there of themselves
    on_gpus = gpus > 0 if said.worker is None else said.worker.get("GPU", 0) > 0
    return Capacity(node_type, num_hosts, per_host, most, on_gpus)


def listed(tree: Mapping[str, Any]) -> Resources:
    """What the hosts of a cluster file have, as far as it is known without asking anybody.

    Where a run asks AWS for an instance type's, here it is the price table; what the file says goes before both.
    """
    if is_own_hosts(tree):
        return {OWN_HOSTS: started_with(tree.get("worker_start_ray_commands") or ())}
    asks = tree["provider"].get("type") == "aws"
    known = {name: _of_instance(node.instance) for name, node in prices.nodes(tree).items()} if asks else {}
    return {name: {**known.get(name, {}), **(kind.get("resources") or {})} for name, kind in worker_types(tree).items()}


def is_own_hosts(tree: Mapping[str, Any]) -> bool:
    return tree["provider"].get("type") == OWN_HOSTS


def worker_types(tree: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The node types but the head's."""
    types = tree.get("available_node_types") or {}
    return {name: kind for name, kind in types.items() if name != tree.get("head_node_type")}


def started_with(commands: Sequence[str]) -> dict[str, float]:
    """What `ray start` is told that a host has; nothing where it finds out by itself."""
    found = dict(re.findall(r"--num-(cpus|gpus)[= ](\d+)", " ".join(commands)))
    return {key[:3].upper(): float(value) for key, value in found.items()}


def _most_hosts(tree: Mapping[str, Any], kind: Mapping[str, Any]) -> int:
    of_all = tree.get("max_workers")
    of_kind = kind.get("max_workers", 1 if of_all is None else of_all)
    return of_kind if of_all is None else min(of_kind, of_all)


def _of_instance(instance: prices.Instance | None) -> dict[str, float]:
    if instance is None:
        return {}
    return {"CPU": instance.vcpus, **({"GPU": instance.gpus} if instance.gpus else {})}
