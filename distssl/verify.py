"""The certificate: a method takes the same steps at any number of workers as in one process with the whole batch.

Every method trains for three optimiser steps in float64 on images sorted by brightness and label, so that each rank's
are unlike the others'. What is compared: the views of every sample, bit by bit; the loss; the gradient after DDP's
mean; and all there is to the method afterwards, parameters, teachers, queues and running statistics. In float64 a wrong
gradient shows, and rounding does not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distssl import atomic, collectives, config, method, plan, train
from distssl.config import Run
from distssl.context import Context
from distssl.data import shards
from distssl.data.shards import Dataset

log = logging.getLogger(__name__)

Elsewhere = Callable[[Sequence["Case"], int], list["Record"]]  # cases, number of workers -> their records

STEPS = 3
LIMIT = 1e-6  # relative, of losses, gradients and parameters
ZERO = 1e-9  # an element below this is the rounding of a zero, such as the mean that a BatchNorm took away
NUM_IMAGES, GLOBAL_BATCH = 96, 16  # an epoch of six steps, three where two batches make one


@dataclass(frozen=True)
class Case:
    """One thing to certify. settings: further key=value of the run."""

    method: str
    accumulate: int = 1
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Record:
    """What three steps left."""

    views: dict[tuple[str, int], str]  # (stream and batch, sample id) -> digest
    losses: list[float]  # of the global batch
    gradients: list[Tensor]  # float64 [P] each, after the mean over ranks
    states: list[dict[str, Tensor]]  # of each rank


@dataclass(frozen=True)
class Verdict:
    """How far a run is from the one in a single process; errors are relative."""

    case: Case
    world_size: int
    views_differ: int  # samples
    loss_error: float
    gradient_error: float
    state_error: float
    worst: str  # the part of the state that is furthest off

    @property
    def holds(self) -> bool:
        errors = (self.loss_error, self.gradient_error, self.state_error)
        return not self.views_differ and all(error <= LIMIT for error in errors)  # a NaN holds nothing


def certify(
    cases: Sequence[Case], world_sizes: Sequence[int], folder: Path, elsewhere: Elsewhere | None = None
) -> Iterator[Verdict]:
    """Yields a verdict for each case and number of workers. folder: for images and runs.

    elsewhere: takes the steps of all on a cluster, those of one process too; without it they are taken on this machine.
    Raises ConfigError for a number of workers that the batch cannot be shared out to.
    """
    packed = pack(folder)
    for world_size in world_sizes:
        plan.of_run(_run(cases[0], packed, folder), Dataset.open(packed), world_size)
    log.info("%d cases in one process", len(cases))
    references = elsewhere(cases, 1) if elsewhere else [record(case, packed, folder / "alone") for case in cases]
    at = elsewhere or functools.partial(_here, packed, folder)
    for world_size in world_sizes:
        log.info("%d cases at %d workers", len(cases), world_size)
        for case, reference, found in zip(cases, references, at(cases, world_size), strict=True):
            yield compare(case, world_size, reference, found)


def pack(folder: Path) -> Path:
    """The images that the certificate is about, packed below a folder; the same on every host."""
    atomic.make_folder(folder)
    with atomic.locked(folder):
        return shards.pack(str(images(folder / "images")), folder / "packed")


def _here(packed: Path, folder: Path, cases: Sequence[Case], world_size: int) -> list[Record]:
    path, *_ = collectives.launch(_record_all, world_size, list(cases), packed, folder / f"w{world_size}")
    return torch.load(path, weights_only=False)


def record(case: Case, packed: Path, storage: Path) -> Record:
    """Take a case's steps on this rank. Every rank calls it and gets what all of them saw and were left with."""
    run = _run(case, packed, storage)
    views: dict[tuple[str, int], str] = {}
    losses, gradients = [], []
    with Context(run.run_dir) as context:
        dataset = Dataset.open(packed)
        labelled = dataset if method.find(case.method).learns_from_labels else None
        training = train.Training(run, context, dataset, labelled=labelled)
        batches = _digested(training.batches(), views)
        for _ in range(STEPS):
            training.window.reset()
            training.take_step(batches)
            loss = _float64([training.window.figures()["loss"]])
            losses.append(float(collectives.sum_(loss)) / collectives.world_size())
            gradients.append(_gradient(training.method))
        training.close()
        state = {name: value.detach().clone() for name, value in training.method.state_dict().items()}
    of_all = {key: digest for part in collectives.gather_objects(views) for key, digest in part.items()}
    return Record(of_all, losses, gradients, collectives.gather_objects(state))


def compare(case: Case, world_size: int, reference: Record, found: Record) -> Verdict:
    keys = reference.views.keys() | found.views.keys()
    (alone,) = reference.states
    errors = {name: _worst((state[name], value) for state in found.states) for name, value in alone.items()}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else torch.inf)
    return Verdict(
        case,
        world_size,
        sum(reference.views.get(key) != found.views.get(key) for key in keys),
        _error(_float64(found.losses), _float64(reference.losses)),
        _worst(zip(found.gradients, reference.gradients, strict=True)),
        errors[worst],
        worst,
    )


def _record_all(cases: Sequence[Case], packed: Path, storage: Path) -> Path:
    """On every rank: the records of all cases, in a file that rank 0 writes."""
    records = [record(case, packed, storage) for case in cases]
    path = storage / "records.pt"
    if collectives.rank() == 0:
        torch.save(records, path)
    collectives.barrier()
    return path


def _run(case: Case, packed: Path, storage: Path) -> Run:
    """A small run of the method; plain SGD, whose parameters show the size of a gradient, which Adam's hide."""
    tree = {
        "name": f"{case.method}_{case.accumulate}",
        "data": {"source": str(packed), "global_batch": GLOBAL_BATCH, "shuffle_window": 1, "labelled_batch": 8},
        "method": {"name": case.method, **method.find(case.method).Config.small},
        "model": {"backbone": "resnet10", "stem": "3x3_s2", "options": {"width": 8}},
        "train": {
            "epochs": 1,
            "optimizer": "sgd",
            "lr": 0.05,
            "warmup_epochs": 0,
            "accumulate": case.accumulate,
            "precision": "float64",
        },
        "machine": {"storage": str(storage), "cache": str(storage / "cache"), "workers": 0},
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in tree.items()]
    return config.load(None, [*overrides, *case.settings], method.options)


def images(folder: Path) -> Path:
    """Stripes and noise, darker ones first, in four classes: PNGs of different sizes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(NUM_IMAGES):
        height, width = rng.integers(40, 64, 2)
        y, x = np.mgrid[:height, :width]
        angle = rng.uniform(0, np.pi)
        stripes = np.sin((np.cos(angle) * x + np.sin(angle) * y) / rng.uniform(1, 6))[..., None]
        pixels = 40 + 180 * i / NUM_IMAGES + 30 * stripes * rng.uniform(-1, 1, 3) + rng.normal(0, 5, (height, width, 3))
        path = folder / f"class{4 * i // NUM_IMAGES}" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def _digested(batches: Iterator[dict[str, Tensor]], digests: dict[tuple[str, int], str]) -> Iterator[dict[str, Tensor]]:
    """Pass batches on, noting what each sample's views are."""
    for number, views in enumerate(batches):
        for stream in ("", "labelled."):
            names = sorted(name for name in views if name.startswith("labelled.") == bool(stream))
            for row, sample in enumerate(views[f"{stream}id"].tolist() if names else ()):
                digest = hashlib.sha256()
                for name in names:
                    digest.update(views[name][row].contiguous().cpu().numpy().tobytes())
                digests[f"{stream}{number}", sample] = digest.hexdigest()
        yield views


def _gradient(module: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in module.parameters() if p.grad is not None])


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _worst(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest error of what was found against its reference; NaN if one is."""
    return float(_float64([_error(*pair) for pair in pairs]).max())


def _error(found: Tensor, reference: Tensor) -> float:
    """|found - reference| / |reference|; what is not a float has to be equal."""
    if found.shape != reference.shape:
        return torch.inf
    if not reference.is_floating_point():
        return 0.0 if torch.equal(found, reference) else torch.inf
    size = max(float(reference.double().norm()), ZERO * reference.numel() ** 0.5)
    return float((found.double() - reference.double()).norm()) / size
