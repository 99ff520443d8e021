"""Pieces of a long benchmark, each a process with a JSON file at its end, so that it can be stopped and run on."""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import provenance

from distssl import atomic


class Cell(Protocol):
    """One piece of work."""

    @property
    def kind(self) -> str:
        """Of pieces that take about as long."""
        ...

    @property
    def seed(self) -> int: ...


C = TypeVar("C", bound=Cell)


def file(cell: Cell, rows: Path) -> Path:
    return rows / f"{cell.kind}_seed{cell.seed}.json"


def read(rows: Path) -> list[dict[str, Any]]:
    """What there is so far."""
    return [json.loads(path.read_text()) for path in sorted(rows.glob("*_seed*.json"))]


def claim(rows: Path, settings: Any) -> None:
    """The folder is for one set of settings. Leaves the program where it holds results of others."""
    rows.mkdir(parents=True, exist_ok=True)
    path, mine = rows / "settings.json", dataclasses.asdict(settings)
    there = json.loads(path.read_text()) if path.exists() else mine
    differs = [f"{key}={there.get(key)} there, {value} here" for key, value in mine.items() if there.get(key) != value]
    if differs:
        sys.exit(f"--rows {rows}: holds results of other settings: {'; '.join(differs)}")
    path.write_text(json.dumps(mine, indent=1) + "\n")


def work(cells: Sequence[C], run: Callable[[C], dict[str, Any]], rows: Path) -> None:
    """run(cell) -> its row, for the cells that have none yet, one process each. Leaves the program where one fails.

    run is picklable; its row gets the seconds it took as "cell_s", and the machine.
    """
    spawn = multiprocessing.get_context("spawn")  # lightly's workers fork: not from a process that DALI was in
    for nth, cell in enumerate(cells):
        if file(cell, rows).exists():
            continue
        print(f"[{nth + 1}/{len(cells)}] {cell.kind}, seed {cell.seed}; {_left(cells, rows)}", flush=True)
        process = spawn.Process(target=_run_cell, args=(cell, run, rows))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{cell.kind}, seed {cell.seed}: failed; the same command goes on from here")


def _run_cell(cell: C, run: Callable[[C], dict[str, Any]], rows: Path) -> None:
    """The whole of a child process."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    started = time.perf_counter()
    with atomic.locked(rows):
        row = run(cell)
        row |= {"seed": cell.seed, "cell_s": time.perf_counter() - started, "machine": provenance.cpu_model()}
        with atomic.replacing(file(cell, rows)) as part:
            part.write_text(json.dumps(row, indent=1) + "\n")


def _die_with_parent() -> None:
    """A killed benchmark must not leave a training behind that the next one would then race with."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _left(cells: Sequence[Cell], rows: Path) -> str:
    """How long the cells to come take, by what their kind took before."""
    seconds: dict[str, list[float]] = {}
    for cell in cells:
        if file(cell, rows).exists():
            seconds.setdefault(cell.kind, []).append(json.loads(file(cell, rows).read_text())["cell_s"])
    to_come = [cell for cell in cells if not file(cell, rows).exists()]
    known = [cell for cell in to_come if cell.kind in seconds]
    left_s = sum(sum(seconds[cell.kind]) / len(seconds[cell.kind]) for cell in known)
    unknown = len(to_come) - len(known)
    return f"about {left_s / 60:.0f} min left" + (f" and {unknown} of unknown length" if unknown else "")
