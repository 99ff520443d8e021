"""Small real runs for tests: a packed folder of images and a config that trains on it in a second."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from distssl import config, method
from distssl.config import Run
from distssl.context import Context
from distssl.data import shards
from distssl.data.shards import Dataset
from distssl.train import Training

TINY = [
    "seed=3",
    "data.global_batch=16",
    "data.shuffle_window=8",
    "data.labelled_batch=8",
    "model.backbone=resnet10",
    "model.stem=3x3_s2",
    "model.options={width: 8}",
    "train.optimizer=sgd",
    "train.lr=0.05",
    "train.warmup_epochs=1",
    "train.precision=float32",
    "train.log_every=1",
    "eval.every=null",
    "eval.labels=[20,null]",
    "machine.ledger=true",
    "machine.workers=0",
]


def photos(folder: Path, *, num: int = 112, classes: int = 4, seed: int = 0) -> Path:
    """A folder of class subfolders with `num` noisy colour gradients, JPEGs and PNGs of different sizes."""
    rng = np.random.default_rng(seed)
    for i in range(num):
        height, width = rng.integers(36, 64, 2)
        y, x = np.mgrid[:height, :width] / 64
        angle, colour = np.pi * (i % classes) / classes, rng.uniform(80, 255, 3)
        wave = 0.5 + 0.5 * np.sin(12 * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 6))
        pixels = wave[..., None] * colour + rng.normal(0, 12, (height, width, 3))
        data = io.BytesIO()
        suffix = ("png", "jpg")[i % 2]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, {"png": "PNG", "jpg": "JPEG"}[suffix])
        path = folder / f"class{i % classes}" / f"{i:04d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())
    return folder


def packed(folder: Path, **options: int) -> Path:
    """`photos`, packed below a folder."""
    return shards.pack(str(photos(folder / "images", **options)), folder / "packed")


def trained(run: Run) -> Run:
    """Trains it in this process, without what comes before and after."""
    run.run_dir.mkdir(parents=True)
    with Context(run.run_dir) as context:
        Training(run, context, Dataset.open(Path(run.data.source))).run()
    return run


def tiny(source: Path, storage: Path, *overrides: str) -> Run:
    """A run on `source` with its folders below `storage`, with the small options of its method."""
    places = [f"data.source={source}", f"machine.storage={storage}", f"machine.cache={storage / 'cache'}"]
    return config.load(None, [*settings(overrides), *places, *overrides], method.options)


def command_line(source: Path, storage: Path, *overrides: str) -> list[str]:
    """What makes launch.py do a run as `tiny` has it, with a config file beside `storage`."""
    file = storage.parent / "nothing.yaml"
    file.write_text("{}\n")
    places = [f"data.source={source}", f"machine.storage={storage}", f"machine.cache={storage / 'cache'}"]
    return ["pretrain", "--config", str(file), *settings(overrides), *places, *overrides]


def settings(overrides: Sequence[str] = ()) -> list[str]:
    """TINY with the small options of the method that `overrides` name, else of SimCLR."""
    named = [override.partition("=")[2] for override in overrides if override.startswith("method.name=")]
    small = method.find(named[-1] if named else "simclr").Config.small
    return [*TINY, *(f"method.{key}={json.dumps(value)}" for key, value in small.items())]
