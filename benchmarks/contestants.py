"""What learn and peer_simclr compare, but for lightly's part: distssl's methods and the untrained network.

All contestants have the same backbone, started from the same weights for the same seed, and the same optimiser and
schedule. Ours are the product's own job, in one process, on tars packed by the product.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import recipes
import torch
from photos import Photos
from rich.console import Console
from stopwatch import Clock
from torch import nn

from distssl import config, job, method, monitor, progress, run_folder
from distssl.config import Run
from distssl.context import Context
from distssl.nn import backbones, optim
from distssl.nn.backbones import Backbone

M = TypeVar("M", bound=nn.Module)
BACKBONE, STEM = "resnet10", "3x3_s2"
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Settings:
    """What is the same for all: a folder of results belongs to one of these."""

    epochs: int = 10
    batch: int = 256
    images: int | None = None
    threads: int = 2
    width: int = 16  # of the backbone's first stage; at torchvision's 64 all of learn.py would take a day on two cores
    lr: float = 1.5e-3
    weight_decay: float = 1e-3


@dataclass
class Trained:
    """wall_s and cpu_s: of the training alone, child processes too; None where it was interrupted."""

    backbone: Backbone
    steps: int = 0
    wall_s: float | None = None
    cpu_s: float | None = None

    @classmethod
    def timed(cls, backbone: Backbone, steps: int, clock: Clock, note: Path, interrupted: bool) -> Trained:
        """`note` keeps the times for a process that dies in its probes and is started again."""
        if not interrupted:
            note.write_text(json.dumps([clock.wall_s, clock.cpu_s]))
        return cls(backbone, steps, *(json.loads(note.read_text()) if note.exists() else ()))


def run_of(name: str, settings: Settings, photos: Photos, out: Path, seed: int, *more: str) -> Run:
    """A method's config: recipes' options, everything else the same for all. more: key=value, over these."""
    labelled = method.find(name).learns_from_labels
    tree: dict[str, Any] = {
        "name": f"{name}_seed{seed}",
        "seed": seed,
        "data": {
            "source": str(photos.packed),
            "global_batch": settings.batch,
            **({"labelled": str(photos.splits["clothing"].train), "num_labelled": 1000} if labelled else {}),
        },
        "method": {"name": name, **recipes.OPTIONS[name]},
        "model": {"backbone": BACKBONE, "stem": STEM, "options": {"width": settings.width}},
        "train": {
            "epochs": settings.epochs,
            "optimizer": "adamw",
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
            "warmup_epochs": WARMUP_SHARE * settings.epochs,
        },
        "eval": {"every": None, "tasks": []},
        "checkpoint": {"every": 30},
        "machine": {
            "workers": 0,
            "threads": settings.threads,
            "storage": str(out / "runs"),
            "cache": str(out / "cache"),
        },
    }
    return config.load(None, [*(f"{key}={json.dumps(value)}" for key, value in tree.items()), *more], method.options)


def pretrained(name: str, settings: Settings, photos: Photos, out: Path, seed: int) -> Trained:
    """The product's pretraining in this process, without Ray; goes on from its own checkpoint."""
    return trained(run_of(name, settings, photos, out, seed))


def trained(run: Run) -> Trained:
    """A run of the product's, likewise."""
    interrupted = run.run_dir.exists()
    with progress.follow(run.run_dir, Console(force_terminal=False)), Clock() as clock:
        ready = job.prepare(run, 1)
        with Context(run.run_dir) as context:
            job.pretrain(run, context, ready)
    steps = monitor.read_jsonl(run.run_dir / monitor.METRICS)[-1]["step"]
    backbone = placed(run_folder.trained(run, run.run_dir).evaluated())
    return Trained.timed(backbone, steps, clock, run.run_dir / "times.json", interrupted)


def untrained(settings: Settings, photos: Photos, out: Path, seed: int) -> Trained:
    """The backbone both SimCLRs start from."""
    del photos, out
    torch.manual_seed(seed)
    return Trained(placed(backbone(settings)))


def backbone(settings: Settings) -> Backbone:
    return backbones.build(BACKBONE, STEM, width=settings.width)


def placed(module: M) -> M:
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def set_rate(optimizer: torch.optim.Optimizer, step: int, base: float, total_steps: int) -> None:
    warmup_steps = round(WARMUP_SHARE * total_steps)
    rate = optim.learning_rate(step, base=base, total_steps=total_steps, warmup_steps=warmup_steps)
    optim.set_learning_rate(optimizer, rate)
