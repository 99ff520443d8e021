"""What peer_simclr compares, but for lightly's part: distssl's SimCLR and the untrained network.

All contestants have the same backbone, started from the same weights for the same seed, and the same optimiser and
schedule. Ours is the product's own job, in one process, on tars packed by the product.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from photos import SIZE_PX, Photos
from rich.console import Console
from stopwatch import Clock
from torch import nn

from distssl import config, job, method, monitor, progress
from distssl.config import Run
from distssl.context import Context
from distssl.nn import backbones, optim

TEMPERATURE = 0.2
HIDDEN, EMBEDDING = 512, 128
NUM_FEATURES = 512  # of the backbone
CROP_AREA = (0.2, 1.0)
JITTER = 0.4  # of brightness, contrast and saturation; a quarter of it is the hue's, as a share of the circle
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Settings:
    """What is the same for all: a folder of results belongs to one of these."""

    epochs: int = 15
    batch: int = 256
    images: int | None = None
    threads: int = 2
    lr: float = 1.5e-3
    weight_decay: float = 1e-3


@dataclass
class Trained:
    """wall_s and cpu_s: of the training alone, child processes too; None where it was interrupted."""

    backbone: nn.Module
    steps: int = 0
    wall_s: float | None = None
    cpu_s: float | None = None

    @classmethod
    def timed(cls, backbone: nn.Module, steps: int, clock: Clock, note: Path, interrupted: bool) -> Trained:
        """`note` keeps the times for a process that dies in its probes and is started again."""
        if not interrupted:
            note.write_text(json.dumps([clock.wall_s, clock.cpu_s]))
        return cls(backbone, steps, *(json.loads(note.read_text()) if note.exists() else ()))


def our_run(settings: Settings, photos: Photos, out: Path, seed: int) -> Run:
    """The product's config; the table of augmentations here is what SimCLRTransform gets below."""
    overrides = {
        "name": f"ours_seed{seed}",
        "seed": seed,
        "data.source": photos.packed,
        "data.global_batch": settings.batch,
        "method.temperature": TEMPERATURE,
        "method.projector": [HIDDEN, EMBEDDING],
        "method.augment.size_px": SIZE_PX,
        "method.augment.crop_area": list(CROP_AREA),
        "method.augment.brightness": JITTER,
        "method.augment.contrast": JITTER,
        "method.augment.saturation": JITTER,
        "method.augment.hue_degrees": JITTER / 4 * 360,
        "method.augment.blur": 0.0,  # as the paper does for small images
        "model.backbone": "resnet10",
        "model.stem": "3x3_s2",
        "train.epochs": settings.epochs,
        "train.optimizer": "adamw",
        "train.lr": settings.lr,
        "train.weight_decay": settings.weight_decay,
        "train.warmup_epochs": WARMUP_SHARE * settings.epochs,
        "eval.every": "null",
        "checkpoint.every": 30,
        "machine.workers": 0,
        "machine.threads": settings.threads,
        "machine.storage": out / "runs",
        "machine.cache": out / "cache",
    }
    return config.load(None, [f"{key}={value}" for key, value in overrides.items()], method.options)


def ours(settings: Settings, photos: Photos, out: Path, seed: int) -> Trained:
    """The product's pretraining in this process, without Ray; goes on from its own checkpoint."""
    run = our_run(settings, photos, out, seed)
    interrupted = run.run_dir.exists()
    with progress.follow(run.run_dir, Console(force_terminal=False)), Clock() as clock:
        pretrain(run)
    steps = monitor.read_jsonl(run.run_dir / monitor.METRICS)[-1]["step"]
    trained = job.trained(run, run.run_dir)
    return Trained.timed(placed(trained.backbone), steps, clock, run.run_dir / "times.json", interrupted)


def pretrain(run: Run) -> None:
    """The product's job in this process."""
    ready = job.prepare(run, 1)
    with Context(run.run_dir) as context:
        job.pretrain(run, context, ready)


def untrained(settings: Settings, photos: Photos, out: Path, seed: int) -> Trained:
    """The backbone both SimCLRs start from."""
    del settings, photos, out
    torch.manual_seed(seed)
    return Trained(placed(backbone()))


def backbone() -> backbones.Backbone:
    return backbones.build("resnet10", "3x3_s2")


def placed(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def set_rate(optimizer: torch.optim.Optimizer, step: int, base: float, total_steps: int) -> None:
    warmup_steps = round(WARMUP_SHARE * total_steps)
    rate = optim.learning_rate(step, base=base, total_steps=total_steps, warmup_steps=warmup_steps)
    optim.set_learning_rate(optimizer, rate)
