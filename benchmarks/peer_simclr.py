"""SimCLR by distssl and by lightly on the same photos, steps and probes, beside a random and a supervised network.

Command: python benchmarks/peer_simclr.py            (--help for the rest; run again, it goes on where it was)

Pretraining sees 8,038 photos at 64 px without labels, those of the clothing test senders among them; grocery's test
photos are not. The probes are distssl.downstream's, on frozen features, for every backbone alike. Every finished
contestant and seed is a JSON file in OUT/rows, trained and probed in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import contestants
import from_scratch
import peer_table
import photos
import torch
from contestants import Settings

from distssl import atomic
from distssl.context import Context
from distssl.nn import precision

METHODS = ("random", "ours", "lightly", "supervised")


@dataclass(frozen=True)
class Cell:
    """One piece of work. data and labels (None: all): of a supervised network."""

    method: str
    seed: int
    data: str = ""
    labels: int | None = None

    @property
    def kind(self) -> str:
        return f"supervised_{self.data}_{self.labels or 'all'}" if self.data else self.method

    def file(self, out: Path) -> Path:
        return out / "rows" / f"{self.kind}_seed{self.seed}.json"


def plan_cells(seeds: int, only: str | None) -> list[Cell]:
    """Seed by seed and within a seed one after the other, so that a drift of the machine meets all alike."""
    cells = []
    for seed in range(seeds):
        for method in METHODS:
            if only not in (None, method):
                continue
            if method == "supervised":
                cells += [Cell(method, seed, data, num) for data, nums in photos.LABELS.items() for num in nums]
            else:
                cells.append(Cell(method, seed))
    return cells


def run_cell(cell: Cell, settings: Settings, prepared: photos.Photos, out: Path) -> None:
    """Train and probe; the whole of a child process."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(settings.threads)
    started = time.perf_counter()
    with atomic.locked(out):
        if cell.method == "supervised":
            value = from_scratch.accuracy(settings, prepared, out, cell.seed, data=cell.data, labels=cell.labels)
            row = {"rows": [{"data": cell.data, "task": "supervised", "labels": cell.labels, "value": value}]}
        else:
            trained = _pretraining(cell.method)(settings, prepared, out, cell.seed)
            row = {"steps": trained.steps, "wall_s": trained.wall_s, "cpu_s": trained.cpu_s}
            print(f"{cell.kind}: probing", flush=True)
            dtype = precision.resolve("auto", "cpu")
            row["rows"] = photos.probe(trained.backbone, prepared, Context(out), settings.threads, dtype)
        row |= {"method": cell.method, "seed": cell.seed, "cell_s": time.perf_counter() - started}
        with atomic.replacing(cell.file(out)) as part:
            part.write_text(json.dumps(row, indent=1) + "\n")


def _die_with_parent() -> None:
    """A killed benchmark must not leave a training behind that the next one would then race with."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _pretraining(name: str) -> Callable[[Settings, photos.Photos, Path, int], contestants.Trained]:
    if name == "lightly":
        import lightly_simclr  # and with it lightly, which the others' processes do not want

        return lightly_simclr.train
    return {"random": contestants.untrained, "ours": contestants.ours}[name]


def work(cells: list[Cell], settings: Settings, prepared: photos.Photos, out: Path) -> None:
    """The cells that have no row yet, one process each. Leaves the program where one fails."""
    (out / "rows").mkdir(exist_ok=True)
    spawn = multiprocessing.get_context("spawn")  # lightly's workers fork: not from a process that DALI was in
    for nth, cell in enumerate(cells):
        if cell.file(out).exists():
            continue
        print(f"[{nth + 1}/{len(cells)}] {cell.kind}, seed {cell.seed}; {_left(cells, out)}", flush=True)
        process = spawn.Process(target=run_cell, args=(cell, settings, prepared, out))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{cell.kind}, seed {cell.seed}: failed; the same command goes on from here")


def _left(cells: list[Cell], out: Path) -> str:
    """How long the cells to come take, by what their kind took before."""
    seconds: dict[str, list[float]] = {}
    for cell in cells:
        if cell.file(out).exists():
            seconds.setdefault(cell.kind, []).append(json.loads(cell.file(out).read_text())["cell_s"])
    to_come = [cell for cell in cells if not cell.file(out).exists()]
    known = [cell for cell in to_come if cell.kind in seconds]
    left_s = sum(sum(seconds[cell.kind]) / len(seconds[cell.kind]) for cell in known)
    unknown = len(to_come) - len(known)
    return f"about {left_s / 60:.0f} min left" + (f" and {unknown} of unknown length" if unknown else "")


def claim(out: Path, settings: Settings) -> None:
    """The folder is for one set of settings. Leaves the program where it holds results of others."""
    out.mkdir(parents=True, exist_ok=True)
    path, mine = out / "settings.json", dataclasses.asdict(settings)
    there = json.loads(path.read_text()) if path.exists() else mine
    differs = [f"{key}={there.get(key)} there, {value} here" for key, value in mine.items() if there.get(key) != value]
    if differs:
        sys.exit(f"--out {out}: holds results of other settings: {'; '.join(differs)}")
    path.write_text(json.dumps(mine, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/peer_simclr"), help="rows, runs and packed photos")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="of pretraining")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, default=Settings.threads, help="of torch, of DALI, and DataLoader workers"
    )
    parser.add_argument("--images", type=int, help="pretrain on so many only, to try the benchmark out")
    parser.add_argument("--only", choices=(*METHODS, "table"))
    args = parser.parse_args()
    settings = Settings(epochs=args.epochs, threads=args.threads, images=args.images)
    out = args.out.resolve()
    claim(out, settings)
    if args.only != "table":
        prepared = photos.prepare(out, settings.images)
        work(plan_cells(args.seeds, args.only), settings, prepared, out)
    text = peer_table.render(out, settings)
    (out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
