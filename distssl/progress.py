"""A run's progress in the terminal, read from the run folder, so it looks the same wherever the workers are."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
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
    with (
        closing(_Tail(run_dir / METRICS)) as tail,  # here, so that no line is missed before the thread looks
        background.beside(lambda done: show(_records(tail, done), console), "progress"),
    ):
        yield


@contextmanager
def bar(what: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Show how far something is: the block calls what it gets with what is done and the whole."""
    with Progress(console=console) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


class _Tail:
    """The lines that are written to a file from now on.

    A resumed run replaces the file by one without the steps that it does again. What is new there comes after the lines
    that both files begin with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb") if path.exists() else None  # noqa: SIM115 - it stays open between looks
        if self._file:
            self._file.seek(0, os.SEEK_END)

    def lines(self) -> list[bytes]:
        """The whole ones since the last call."""
        if not self.path.exists():
            return []
        newest = open(self.path, "rb")  # noqa: SIM115 - the next look needs it
        if self._file:
            if os.path.sameopenfile(newest.fileno(), self._file.fileno()):
                newest.seek(self._file.tell())
            else:
                shown = self._file.tell()
                self._file.seek(0)
                kept = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._file, newest, strict=False))
                newest.seek(min(shown, sum(len(line) for line, _ in kept)))
            self._file.close()
        self._file = newest
        *whole, cut = newest.read().split(b"\n")
        newest.seek(-len(cut), os.SEEK_CUR)
        return whole

    def close(self) -> None:
        if self._file:
            self._file.close()


def _records(tail: _Tail, done: threading.Event) -> Iterator[dict]:
    """The rows of metrics.jsonl as they are written."""
    while True:
        last_look = done.is_set()
        yield from map(json.loads, tail.lines())
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
