"""What a cluster costs by the hour, from cluster/prices.yaml and the cluster file of Ray's launcher.

The table is of one date and holds list prices: it says what a run costs about, not what will be on the bill.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

TABLE = Path(__file__).parent.parent / "cluster" / "prices.yaml"
SPOT = {"SPOT", "PREEMPTIBLE"}


class Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Accelerator(Entry):
    """A GPU that is attached to an instance, a piece. US dollars an hour."""

    usd_per_hour: float = Field(gt=0)
    spot_usd_per_hour: float = Field(gt=0)
    gpu: str


class Instance(Entry):
    """One type of machine. US dollars an hour; network_gbit_per_s is the most one gets."""

    usd_per_hour: float = Field(gt=0)
    spot_usd_per_hour: float = Field(gt=0)
    gpus: int = Field(ge=0)
    gpu: str | None
    vcpus: int = Field(gt=0)
    network_gbit_per_s: float = Field(gt=0)


class Provider(Entry):
    regions: tuple[str, ...]
    instances: dict[str, Instance]
    accelerators: dict[str, Accelerator] = {}


class Table(Entry):
    """date: when all of it was put down. source: where from."""

    date: str
    source: str
    providers: dict[str, Provider]


@dataclass(frozen=True)
class Node:
    """A node type of a cluster file, as far as prices go. kind: the instance's type, "" where the file names none."""

    kind: str
    is_spot: bool
    instance: Instance | None  # with its accelerators; None where the table does not know it

    @property
    def usd_per_hour(self) -> float | None:
        if self.instance is None:
            return None
        return self.instance.spot_usd_per_hour if self.is_spot else self.instance.usd_per_hour


@dataclass(frozen=True)
class Bill:
    """usd_per_hour: of all nodes whose price is known. unknown: the node types of the others."""

    usd_per_hour: float
    unknown: tuple[str, ...]


@functools.cache
def table(file: Path = TABLE) -> Table:
    return Table.model_validate(yaml.safe_load(file.read_text()))


def nodes(cluster: Mapping[str, Any]) -> dict[str, Node]:
    """The node types of a cluster file (Ray's schema) by name."""
    kind = str(cluster.get("provider", {}).get("type", ""))
    provider = table().providers.get(kind)
    types = cluster.get("available_node_types") or {}
    return {name: _node(provider, dict(of.get("node_config") or {})) for name, of in types.items()}


def hourly(cluster: Mapping[str, Any]) -> dict[str, float | None]:
    """US dollars an hour of one node of each type; None where the table does not know the type."""
    return {name: node.usd_per_hour for name, node in nodes(cluster).items()}


def bill(cluster: Mapping[str, Any], counts: Mapping[str, int]) -> Bill:
    """What `counts` nodes of each type cost by the hour. A type that is not in the file is an unknown one."""
    each = hourly(cluster)
    there = {name: count for name, count in counts.items() if count}
    known = {name: price for name in there if (price := each.get(name)) is not None}
    total = sum(there[name] * price for name, price in known.items())
    return Bill(total, tuple(name for name in there if name not in known))


def in_region(cluster: Mapping[str, Any]) -> bool:
    """Whether the cluster is where the table's prices are of."""
    at = cluster.get("provider", {})
    provider = table().providers.get(str(at.get("type", "")))
    return provider is not None and at.get("region") in provider.regions


def _node(provider: Provider | None, config: Mapping[str, Any]) -> Node:
    """AWS and GCP name the same things differently, and GCP a machine by its name or by a URL that ends in it."""
    kind = _last(config.get("InstanceType") or config.get("machineType") or "")
    instance = provider.instances.get(kind) if provider else None
    for wanted in config.get("guestAccelerators") or ():
        instance = _with(provider, instance, wanted)
    return Node(kind, _is_spot(config), instance)


def _is_spot(config: Mapping[str, Any]) -> bool:
    if (config.get("InstanceMarketOptions") or {}).get("MarketType") == "spot":
        return True
    scheduling = config.get("scheduling") or ()
    parts = [scheduling] if isinstance(scheduling, Mapping) else scheduling
    return any(part.get("preemptible") is True or part.get("provisioningModel") in SPOT for part in parts)


def _with(provider: Provider | None, instance: Instance | None, wanted: Mapping[str, Any]) -> Instance | None:
    """An instance with the accelerators a node asks for; None where their price is not known."""
    if instance is not None and instance.gpus:
        return instance  # its price is with them
    one = provider.accelerators.get(_last(wanted.get("acceleratorType", ""))) if provider else None
    if one is None or instance is None:
        return None
    count = int(wanted.get("acceleratorCount", 1))
    more = {
        "usd_per_hour": instance.usd_per_hour + count * one.usd_per_hour,
        "spot_usd_per_hour": instance.spot_usd_per_hour + count * one.spot_usd_per_hour,
    }
    return instance.model_copy(update={**more, "gpus": count, "gpu": one.gpu})


def _last(name: str) -> str:
    return str(name).rpartition("/")[2]
