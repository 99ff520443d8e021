"""Measures a few steps of a run on this machine, for `estimate`: each rank alone, without the others it will talk to.

A rank does all that one of W does, norms and losses over the global batch among it, but its collectives return at once.
Ranks that share a machine are measured side by side, each in a process of its own with the threads it would have: they
take from each other cores, memory bandwidth and clock. What they would exchange is counted in two real ranks at small
batches, and this machine's own alpha and beta are fitted to all-reduces between those while both of them load images,
as ranks that train do: on idle cores a small one takes an eighth of the time.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from distssl import atomic, collectives, config, exchange, method, train
from distssl.config import Run
from distssl.context import Context
from distssl.data import order
from distssl.data.locations import Place
from distssl.data.shards import Dataset
from distssl.errors import ConfigError
from distssl.estimate import Collective, Links, Timing

VERSION = 3
CPU = "cpu"
PART_S = 3.0  # of measuring each of a timing's three figures; at least MIN_BATCHES
MIN_BATCHES = 3
WARM_BATCHES = 2
MANY_EPOCHS = 10**6  # the run measured must not end meanwhile
COUNTED_IMAGES = 8  # a rank, where collectives are counted


@dataclass(frozen=True)
class Calibration:
    """What was measured, on what, and of which run. links: between processes of the machine."""

    machine: str
    cores: int
    device: str  # CPU, or the GPU's name
    torch_threads: dict[int, int]  # ranks on the machine -> threads of each
    of: dict[str, Any]  # the settings a timing is a function of
    gradient_bytes: int
    blocking: tuple[Collective, ...]  # what a step waits for, the gradient aside
    links: Links
    epoch_start_s: float  # what comes before each epoch, of one rank alone
    timings: tuple[Timing, ...]
    too_large: int | None  # the smallest N that this machine has no memory for, of those tried

    @property
    def on_gpu(self) -> bool:
        return self.device != CPU


@dataclass(frozen=True)
class Data:
    """What a run reads, packed. labelled: for a method that learns from labels too."""

    images: Place
    labelled: Place | None = None


@dataclass(frozen=True)
class _Found:
    """Of one rank in a group."""

    gradient_bytes: int
    epoch_start_s: float
    timing: Timing


def measure(run: Run, data: Data, batches: Iterable[tuple[int, int]], part_s: float = PART_S) -> Calibration:
    """Take a few steps at each (images a rank N, ranks side by side R) of `batches`; N is a share of the global batch
    that some number of workers would have. The smallest first, up to what there is memory for. Raises ConfigError where
    that is nothing."""
    found, too_large = [], None
    for images, beside in sorted(batches):
        try:
            ranks = collectives.attempt(_measure, beside, run, data, images, threads(beside), not found, part_s)
        except collectives.NoMemoryError:
            too_large = images
            break
        found.append(_mean_of_ranks(ranks))
    if not found:
        told = f"no memory here for {too_large} images a worker; a smaller one or train.micro_batch is right"
        raise ConfigError(f"data.global_batch={run.data.global_batch}: {told}")
    blocking, links = collectives.attempt(_talk, 2, run, data)[0]
    timings = tuple(one.timing for one in found)
    return Calibration(
        machine=_cpu_model(),
        cores=os.cpu_count() or 1,
        device=device(),
        torch_threads={one.beside: threads(one.beside) for one in timings},
        of=_settings(run),
        gradient_bytes=found[0].gradient_bytes,
        blocking=blocking,
        links=links,
        epoch_start_s=found[0].epoch_start_s,
        timings=timings,
        too_large=too_large,
    )


def _mean_of_ranks(ranks: Sequence[_Found]) -> _Found:
    same = [rank.timing for rank in ranks]
    figures = {name: sum(getattr(one, name) for one in same) / len(same) for name in ("load_s", "compute_s", "step_s")}
    return replace(ranks[0], timing=replace(same[0], **figures))


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def device() -> str:
    """What a calibration made here would be of."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else CPU


def threads(beside: int) -> int:
    """torch's threads of each of so many ranks on this machine, as Ray gives them: an even share of the cores."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // beside))


def save(calibration: Calibration, file: Path) -> None:
    with atomic.replacing(file) as new:
        new.write_text(json.dumps({"version": VERSION, **asdict(calibration)}, indent=1))


def load(file: Path, run: Run) -> Calibration:
    """What `save` wrote. Raises ConfigError where it is no calibration, or of a run whose steps are other ones."""
    try:
        tree = json.loads(file.read_text())
        if tree.pop("version") != VERSION:
            raise ConfigError(f"--calibration {file}: of another version of distssl; measure again with --save")
        tree["blocking"] = tuple(Collective(**one) for one in tree["blocking"])
        tree["timings"] = tuple(Timing(**one) for one in tree["timings"])
        tree["torch_threads"] = {int(beside): num for beside, num in tree["torch_threads"].items()}
        read = Calibration(**{**tree, "links": Links(**tree["links"])})
    except OSError as error:
        raise ConfigError(f"--calibration {file}: {error.strerror}; a file that --save wrote is right") from None
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"--calibration {file}: not a calibration; a file that --save wrote is right") from None
    here = _settings(run)
    differs = [key for key in {**read.of, **here} if read.of.get(key) != here.get(key)]
    if differs:
        raise ConfigError(
            *(f"--calibration {file}: {key}={read.of.get(key)!r} there, {here.get(key)!r} here" for key in differs),
            "measure again with --save",
        )
    return read


def _settings(run: Run) -> dict[str, Any]:
    """What a rank's step is a function of, its batch size aside."""
    of = ("method.", "model.", "train.precision", "train.optimizer", "train.micro_batch")
    chosen = {key: value for key, value in config.science(run).items() if key.startswith(of)}
    return json.loads(json.dumps({**chosen, "data.source": run.data.source, "machine.threads": run.machine.threads}))


@contextmanager
def _training(
    run: Run, images: int, data: Data, lanes: int, device: torch.device | None = None
) -> Iterator[train.Training]:
    """A run of this process's group at `images` a rank, in a folder that is thrown away."""
    size = images * collectives.world_size()
    share = size / run.data.global_batch
    labelled = max(1, round(run.data.labelled_batch * share / lanes)) * lanes
    sizes = {"global_batch": size, "lanes": lanes, "labelled_batch": labelled, "num_labelled": None}
    micro_batch = round(run.train.micro_batch * share) if run.train.micro_batch else None
    changed = run.model_copy(
        update={
            "data": run.data.model_copy(update=sizes),
            "model": run.model.untrained,
            "train": run.train.model_copy(update={"accumulate": 1, "micro_batch": micro_batch, "epochs": MANY_EPOCHS}),
        }
    )
    with tempfile.TemporaryDirectory(prefix="distssl-calibrate-") as folder, Context(Path(folder)) as context:
        context.device = device or context.device
        labels = Dataset.open(data.labelled, run.machine) if data.labelled else None
        training = train.Training(changed, context, Dataset.open(data.images, run.machine), labelled=labels)
        yield training
        training.close()


def _measure(run: Run, data: Data, images: int, num_threads: int, is_first: bool, part_s: float) -> _Found:
    """One rank of those side by side, which begin together; from then on each is for itself."""
    beside = collectives.world_size()
    collectives.shutdown()  # from here on they have nothing to do with each other
    torch.set_num_threads(num_threads)
    # What comes before an epoch exchanges things whose meaning counts: there a rank is measured as the only one.
    world_size = 1 if method.find(run.method.name).embeds else run.data.global_batch // images
    num_lanes = order.lanes_of(run) * images * world_size // run.data.global_batch
    with _one_of(world_size), _training(run, images, data, num_lanes) as training:
        training.model = training.method
        timing = _time(training, images, beside, part_s)
        starts = is_first and training.method.embeds
        epoch_start_s = _mean(training, training.start_epoch, 0.0, at_least=1) if starts else 0.0
        return _Found(_gradient_bytes(training), epoch_start_s, timing)


@contextmanager
def _one_of(world_size: int) -> Iterator[None]:
    """A rank of so many, with norms over all of them and losses of all their rows, but no others to wait for."""
    if world_size > 1:
        collectives.pretend(world_size)
    try:
        yield
    finally:
        collectives.shutdown()


def _time(training: train.Training, images: int, beside: int, part_s: float) -> Timing:
    batches = training.batches()
    for _ in range(WARM_BATCHES):
        training.take_step(batches)
    step_s = _mean(training, lambda: training.take_step(batches), part_s)
    views = itertools.repeat(next(batches))
    training.take_step(views)  # while the loader fills its queue for the last time
    compute_s = _mean(training, lambda: training.take_step(views), part_s)
    for _ in range(training.cfg.machine.prefetch + 1):
        next(batches)
    load_s = _mean(training, lambda: next(batches), part_s)
    return Timing(images, beside, load_s=load_s, compute_s=compute_s, step_s=step_s)


def _mean(training: train.Training, act: Callable[[], object], for_s: float, at_least: int = MIN_BATCHES) -> float:
    """Seconds of one of as many as that takes."""
    started, num = time.perf_counter(), 0
    while num < at_least or time.perf_counter() - started < for_s:
        act()
        num += 1
    _finish(training)
    return (time.perf_counter() - started) / num


def _finish(training: train.Training) -> None:
    """A GPU is done with what it was given."""
    if training.context.device.type == "cuda":
        torch.cuda.synchronize(training.context.device)


def _gradient_bytes(training: train.Training) -> int:
    learnt = (parameter for parameter in training.method.parameters() if parameter.requires_grad)
    return sum(parameter.numel() * parameter.element_size() for parameter in learnt)


def _talk(run: Run, data: Data) -> tuple[tuple[Collective, ...], Links]:
    """One of two ranks: what a step waits for besides the gradient, and how fast the machine's processes talk."""
    parts = run.data.global_batch // run.train.micro_batch if run.train.micro_batch else 1
    images = parts * math.ceil(max(1, min(COUNTED_IMAGES, run.data.global_batch // 2)) / parts)
    with _training(run, images, data, collectives.world_size(), torch.device("cpu")) as training:
        training.model = training.method  # without DistributedDataParallel, whose all-reduces are known
        batches = training.batches()
        training.take_step(batches)
        counted = exchange.count(lambda: training.take_step(batches))
        return counted, exchange.measure_links(batches)
