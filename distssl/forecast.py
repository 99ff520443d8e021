"""What a run would take, before anybody pays for it: hours, dollars and what limits it, at each number of workers.

From a calibration of a few steps (`calibrate`), the model in `estimate` and the prices of the cluster's machines. What
was not measured and cannot be known is left open, and what is assumed is printed below the table.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from distssl import calibrate, capacity, estimate, job, plan, prices
from distssl.calibrate import Calibration
from distssl.config import Run
from distssl.data import order
from distssl.data.shards import Dataset
from distssl.errors import ConfigError
from distssl.estimate import Links, Prediction

NETWORK_ALPHA_S = 200e-6  # a handshake between machines of one zone; not measured
UNKNOWN_GBIT_PER_S = 10.0  # of machines that the table does not know
UNKNOWN_GPU = "unknown"
MOST_MEASURED = 4  # batch sizes on one machine
HERE = "this machine"


@dataclass(frozen=True)
class Place:
    """Where so many workers would run."""

    name: str
    num_nodes: int
    world_size: int
    beside: int  # workers on the fullest node
    gpu: str | None
    links: Links | None  # between machines; None on one machine alone
    usd_per_hour: float | None  # of all nodes, the head among them


@dataclass(frozen=True)
class Row:
    """hours: without what comes before and after the steps. None: cannot be told from this calibration."""

    place: Place
    prediction: Prediction | None
    hours: float | None

    @property
    def usd(self) -> float | None:
        return None if self.hours is None else estimate.cost(self.hours, self.place.usd_per_hour)


@dataclass(frozen=True)
class Forecast:
    plan: plan.Plan
    rows: tuple[Row, ...]
    assumed: tuple[str, ...]


def make(
    run: Run, cluster: Mapping[str, Any] | None = None, given: Path | None = None, save: Path | None = None
) -> Forecast:
    """cluster: a cluster file's tree. given: a calibration to use instead of measuring. save: where to keep one.

    Raises ConfigError for a config, cluster file or calibration that cannot be used.
    """
    places = [] if cluster is None else _on_cluster(run, cluster)
    measured = calibrate.load(given, run) if given else None
    if save and (given or not save.absolute().parent.is_dir()):
        raise ConfigError(f"--save {save}: a file in a folder that is there, and no --calibration, is right")
    folders = job.folders(run, ())
    planned = plan.of_run(run, Dataset.open(folders.data, run.machine), 1)
    device = measured.device if measured else calibrate.device()
    asked = [place for place in places if _tells_of(device, place)]
    if measured is None and (save or cluster is None or asked):
        batches = _batches_of(run, asked) | (_batches(run, bool(save)) if save or cluster is None else set())
        measured = calibrate.measure(run, calibrate.Data(folders.data, folders.labelled), batches)
    if save and measured:
        calibrate.save(measured, save)
    if cluster is None:
        assert measured
        places = _here(run, measured)
    elif measured and measured.on_gpu and measured.too_large:  # a host has another memory than this machine
        most = measured.too_large
        places = [one for one in places if one not in asked or run.data.global_batch // one.world_size < most]
    rows = tuple(_row(run, planned, measured if _tells_of(device, place) else None, place) for place in places)
    return Forecast(planned, rows, tuple(_assumed(measured, rows, cluster)))


def _batches(run: Run, save: bool) -> set[tuple[int, int]]:
    """(N, R) to measure: as workers would be on this machine; to be kept, also alone and on several such machines."""
    fits, batch = _world_sizes(run), run.data.global_batch
    num_gpus = torch.cuda.device_count()
    here = [world_size for world_size in fits if world_size <= (num_gpus or os.cpu_count() or 1)]
    found = {(batch // world_size, world_size) for world_size in _some(here)}
    if save:
        found |= {(batch // world_size, 1) for world_size in _some(fits)}
    if save and num_gpus:
        found |= {(batch // world_size, here[-1]) for world_size in _some([n for n in fits if n % here[-1] == 0])}
    return found


def _batches_of(run: Run, places: Sequence[Place]) -> set[tuple[int, int]]:
    """(N, R) as workers would be there, as far as this machine has room for so many side by side."""
    room = torch.cuda.device_count() or os.cpu_count() or 1
    found = set()
    for beside in {place.beside for place in places}:
        world_sizes = sorted({place.world_size for place in places if place.beside == beside})
        found |= {(run.data.global_batch // num, min(beside, room)) for num in _some(world_sizes)}
    return found


def _some(numbers: Sequence[int]) -> list[int]:
    """At most MOST_MEASURED of them, the first and the last among them."""
    num = min(len(numbers), MOST_MEASURED)
    return [numbers[nth * (len(numbers) - 1) // max(num - 1, 1)] for nth in range(num)]


def _world_sizes(run: Run) -> list[int]:
    """The numbers of workers a run can have."""
    lanes = order.lanes_of(run)
    return [world_size for world_size in range(1, lanes + 1) if lanes % world_size == 0]


def _here(run: Run, measured: Calibration) -> list[Place]:
    gpu = measured.device if measured.on_gpu else None
    most = measured.too_large or math.inf
    there = {timing.beside for timing in measured.timings}
    fits = [num for num in _world_sizes(run) if num in there and run.data.global_batch // num < most]
    return [Place(HERE, 1, num, num, gpu, None, None) for num in fits]


def _on_cluster(run: Run, cluster: Mapping[str, Any]) -> list[Place]:
    """On each number of hosts the most workers that the lanes admit; the last is what a run takes of itself."""
    room = _capacity(cluster)
    name = "host" if room.node_type == capacity.OWN_HOSTS else room.node_type
    head = cluster.get("head_node_type")
    node = prices.nodes(cluster).get(room.node_type, prices.Node("", False, None))
    gbit_per_s = node.instance.network_gbit_per_s if node.instance else UNKNOWN_GBIT_PER_S
    links = Links.of_network(gbit_per_s, NETWORK_ALPHA_S)
    gpu = ((node.instance and node.instance.gpu) or UNKNOWN_GPU) if room.on_gpus else None
    fits, places = _world_sizes(run), []
    for num in range(1, room.num_hosts + 1):
        world_size = max(size for size in fits if size <= room.on(num))
        if world_size <= room.on(num - 1):
            continue  # the host before has room for them
        bill = prices.bill(cluster, {room.node_type: num} | ({head: 1} if head else {}))
        usd = None if bill.unknown else bill.usd_per_hour
        beside = min(room.per_host, world_size)
        places.append(Place(name, num, world_size, beside, gpu, links if num > 1 else None, usd))
    if not places:
        raise ConfigError("--cluster: max_workers=0 leaves no host; 1 or more is right")
    return places


def _capacity(cluster: Mapping[str, Any]) -> capacity.Capacity:
    """As a run would have it."""
    provider, types = cluster.get("provider"), cluster.get("available_node_types")
    is_whole = isinstance(provider, Mapping) and (
        capacity.is_own_hosts(cluster) or (isinstance(types, Mapping) and bool(capacity.worker_types(cluster)))
    )
    if not is_whole:
        raise ConfigError("--cluster: no provider or available_node_types; a file as those in cluster/ is right")
    return capacity.of(cluster, capacity.options(cluster, "--cluster"), capacity.listed(cluster))


def _row(run: Run, planned: plan.Plan, measured: Calibration | None, place: Place) -> Row:
    if measured is None:
        return Row(place, None, None)
    timing = estimate.alone(measured.timings, run.data.global_batch // place.world_size, place.beside)
    predicted = estimate.step(
        timing,
        place.world_size,
        place.links or measured.links,
        gradient_bytes=measured.gradient_bytes,
        blocking=measured.blocking,
        accumulate=run.train.accumulate,
        overlap=place.links is not None or measured.on_gpu,
    )
    starts_s = planned.epochs * measured.epoch_start_s / place.world_size
    return Row(place, predicted, estimate.hours(planned.total_steps, predicted.step_s) + starts_s / 3600)


def _tells_of(device: str, place: Place) -> bool:
    """Whether what was measured on a device says anything of a place: a GPU's speed is known from such a GPU alone."""
    if place.name == HERE or place.gpu is None or device == calibrate.CPU:
        return place.name == HERE or (place.gpu is None and device == calibrate.CPU)
    return place.gpu in re.split(r"[^A-Za-z0-9]+", device)  # "NVIDIA L40S" is no L4


def _assumed(measured: Calibration | None, rows: Sequence[Row], cluster: Mapping[str, Any] | None) -> list[str]:
    lines = _assumed_of(measured) if measured else []
    if cluster is None:
        return lines
    told = [row for row in rows if row.prediction]
    if any(row.place.gpu is None for row in told):
        lines.append("a core there is as fast as one here, and a machine has as many as this one")
    if told:
        lines.append(f"network: the machines' list rate, {NETWORK_ALPHA_S * 1e6:.0f} us a message; not measured")
        lines.append("data are read as fast as here: shards are on the machine's disk, or ahead in its cache")
    table = prices.table()
    lines.append(f"prices: {table.source}, of {table.date}: check them. The head is in, disks and traffic are not")
    if not prices.in_region(cluster):
        lines.append("the cluster's region is none of the table's, where prices differ")
    unknown = sorted({row.place.name for row in rows if row.place.usd_per_hour is None})
    if unknown:
        lines.append(f"{', '.join(unknown)}: cluster/prices.yaml has no price of it or of the head")
    strangers = sorted({row.place.name for row in rows if row.prediction is None})
    if strangers:
        lines.append(
            f"{', '.join(strangers)}: how fast its GPU is nothing measured here can tell. On one such machine run "
            "`python launch.py plan --save FILE` with this config, then here with --calibration FILE"
        )
    return lines


def _assumed_of(measured: Calibration) -> list[str]:
    threads = ", ".join(f"{num} at {beside} a machine" for beside, num in sorted(measured.torch_threads.items()))
    place = f"{measured.machine}, {measured.cores} cores"
    if measured.on_gpu:
        place += f", {measured.device}"
    rate, alpha_us = 1e-9 / measured.links.beta_s, measured.links.alpha_s * 1e6
    full = [f"no memory there for {measured.too_large} images a worker"] if measured.too_large else []
    return [
        f"measured on {place}; torch threads a worker: {threads}",
        *full,
        f"workers of one machine talk at {rate:.2g} GB/s and {alpha_us:.0f} us a message, as measured there",
        "not counted: start-up, evaluations, checkpoints, spot instances that are taken away",
    ]


def show(forecast: Forecast, console: Console) -> None:
    """Print a forecast; fits 80 columns."""
    planned = forecast.plan
    console.print(
        f"{planned.total_steps} steps of {planned.images_per_step} images: "
        f"{planned.epochs} epochs of {planned.steps_per_epoch} steps"
    )
    priced = any(row.place.name != HERE for row in forecast.rows)
    drawn = Table()
    for name in ("machines", "W", "images/s", "hours", *(("$/hour", "$") if priced else ()), "limit", "waits"):
        justify = "left" if name in ("machines", "limit") else "right"
        drawn.add_column(name, justify=justify, no_wrap=name not in ("machines", "limit"))
    for row in forecast.rows:
        place, step = row.place, row.prediction
        drawn.add_row(
            place.name if place.name == HERE else f"{place.num_nodes} {place.name}",
            str(place.world_size),
            f"{step.images_per_s:.3g}" if step else "?",
            _number(row.hours),
            *((_number(place.usd_per_hour), _number(row.usd)) if priced else ()),
            step.bottleneck if step else "?",
            f"{step.exchange_s / step.step_s:.0%}" if step else "?",
        )
    console.print(drawn)
    for line in ("W workers; waits: the share of a step that they spend on each other's numbers", *forecast.assumed):
        console.print(f"- {line}", soft_wrap=True, markup=False, highlight=False)


def _number(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
