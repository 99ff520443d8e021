"""A run's progress in the terminal, read from the run folder, so it looks the same wherever the workers are."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distssl import background
from distssl.monitor import METRICS

POLL_S = 0.5
PLAIN_EVERY_S = 10  # between lines where there is no terminal to draw a bar on


def describe(metrics: dict) -> str:
    """The figures worth a glance, in one line."""
    parts = [f"epoch {metrics['epoch']:.1f}", f"loss {metrics['loss']:.3f}", f"{metrics['images_per_s']:.0f} images/s"]
    if "knn" in metrics:
        parts.append(f"kNN {metrics['knn']:.1%}")
    return ", ".join(parts)


@contextmanager
def follow(run_dir: Path, console: Console) -> Iterator[None]:
    """Show the run's steps while the block runs: a bar on a terminal, lines elsewhere."""
    show = _bar if console.is_terminal else _lines
    path = run_dir / METRICS
    start = path.stat().st_size if path.exists() else 0  # here, so that no line is missed before the thread looks
    with background.beside(lambda done: show(_records(path, start, done), console), "progress"):
        yield


@contextmanager
def bar(what: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is: the block calls what it gets with what is done and the whole."""
    with Progress(console=console) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _records(path: Path, position: int, done: threading.Event) -> Iterator[dict]:
    """The lines of metrics.jsonl from a byte on, as they are written; a file cut back is read on from its new end."""
    rest = ""
    while True:
        last_look = done.is_set()
        if path.exists():
            position = min(position, path.stat().st_size)
            with open(path) as file:
                file.seek(position)
                rest += file.read()
                position = file.tell()
        *lines, rest = rest.split("\n")
        yield from (json.loads(line) for line in lines if line)
        if last_look:
            return
        done.wait(POLL_S)


def _bar(records: Iterator[dict], console: Console) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting workers", total=None, figures="")
        for record in records:
            if "loss" in record:
                progress.update(
                    task,
                    description="pretraining",
                    total=record["total_steps"],
                    completed=record["step"],
                    figures=describe(record),
                )


def _lines(records: Iterator[dict], console: Console) -> None:
    said = -float("inf")
    for record in records:
        if "loss" not in record:
            continue
        last = record["step"] == record["total_steps"]
        if last or time.monotonic() - said > PLAIN_EVERY_S:
            said = time.monotonic()
            eta = f"{record['eta_s'] // 60:.0f}:{record['eta_s'] % 60:02.0f}"
            console.print(f"step {record['step']}/{record['total_steps']}, {describe(record)}, {eta} left")
