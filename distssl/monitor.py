"""What a run tells while it goes: metrics.jsonl, TensorBoard, the ledger, the quarantine. Rank 0 alone has one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from distssl import atomic
from distssl.data import pixels, quarantine
from distssl.data.quarantine import Entry

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
QUARANTINE = "quarantine.jsonl"
LEDGER = "ledger.jsonl"
NUM_PICTURES = 8  # samples in a picture


def cut_back(path: Path, step: int) -> None:
    """Drop the lines of a .jsonl after `step`, those of work that a resumed run does again, and a line cut short."""
    if not path.exists():
        return
    with atomic.replacing(path) as file:
        file.write_text("".join(f"{json.dumps(row)}\n" for row in read_jsonl(path) if row.get("step", 0) <= step))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl, [] where there is none; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    *lines, cut = path.read_text().split("\n")
    del cut  # "" where the last line is whole
    return [json.loads(line) for line in lines]


def _append(path: Path, row: dict[str, Any]) -> None:
    with atomic.full_disk_named(path), open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


class Monitor:
    """The record of one run, from `step` on."""

    def __init__(self, run_dir: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = run_dir
        for name in (METRICS, LEDGER, QUARANTINE):  # the last has no steps: only a line cut short goes
            cut_back(run_dir / name, step)
        self._writer = SummaryWriter(run_dir, purge_step=step + 1)
        self._metrics = run_dir / METRICS
        self._ledger = run_dir / LEDGER

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and as many points in TensorBoard. step: optimiser steps done.

        Raises ConfigError when the disk is full.
        """
        _append(self._metrics, {"step": step, **metrics})
        with atomic.full_disk_named(self._metrics):  # TensorBoard's thread hands on what its last write met
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def text(self, name: str, text: str, step: int = 0) -> None:
        self._writer.add_text(name, f"```\n{text}\n```", step)

    def pictures(self, views: list[torch.Tensor], step: int, name: str = "views") -> None:
        """A row a sample, a column a view; smaller views are padded. views: [N, 3, H, W] each, normalised."""
        from torchvision.utils import make_grid

        height, width = (max(view.shape[dim] for view in views) for dim in (2, 3))
        shown = [
            F.pad(
                pixels.rgb(view.float().cpu()).clamp(0, 1),
                (0, width - view.shape[3], 0, height - view.shape[2]),
                value=1,
            )
            for view in views
        ]
        # Of a second stream there may be fewer.
        rows = [image for sample in zip(*shown, strict=False) for image in sample]
        self._writer.add_image(name, make_grid(rows, nrow=len(views), pad_value=1), step)

    def ledger(self, step: int, epoch: int, ids: list[int]) -> None:
        """The sample ids an optimiser step was made of."""
        _append(self._ledger, {"step": step, "epoch": epoch, "ids": ids})

    def quarantine(self, entries: list[Entry]) -> None:
        """Add what is new to quarantine.jsonl."""
        path = self.run_dir / QUARANTINE
        known = {quarantine.place(cast(Entry, entry)) for entry in read_jsonl(path)}
        for entry in entries:
            if quarantine.place(entry) not in known:
                known.add(quarantine.place(entry))
                _append(path, dict(entry))

    def close(self) -> None:
        self._writer.close()
