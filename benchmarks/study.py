"""What learn and peer_simclr share: a contestant and seed, trained and probed, is one row of figures in a JSON file.

A row that one of them has made serves the other too.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import contestants
import from_scratch
import numpy as np
import photos
import torch
from contestants import Settings

from distssl import monitor
from distssl.context import Context
from distssl.nn import diagnostics, precision

ROWS = Path(__file__).parent / "rows"


@dataclass(frozen=True)
class Cell:
    """One piece of work. data and labels (None: all): of a supervised network."""

    contestant: str
    seed: int
    data: str = ""
    labels: int | None = None

    @property
    def kind(self) -> str:
        return f"{self.contestant}_{self.data}_{self.labels or 'all'}" if self.data else self.contestant


def plan(contestants: Sequence[str], num_seeds: int) -> list[Cell]:
    """Seed by seed and within a seed one after the other, so that a drift of the machine meets all alike."""
    planned = []
    for seed in range(num_seeds):
        for name in contestants:
            if name == "supervised":
                planned += [Cell(name, seed, data, num) for data, nums in photos.LABELS.items() for num in nums]
            else:
                planned.append(Cell(name, seed))
    return planned


def run_cell(settings: Settings, prepared: photos.Photos, out: Path, cell: Cell) -> dict[str, Any]:
    """Train and probe: the cell's row."""
    torch.set_num_threads(settings.threads)
    if cell.contestant == "supervised":
        value = from_scratch.accuracy(settings, prepared, out, cell.seed, data=cell.data, labels=cell.labels)
        rows = [{"data": cell.data, "task": "linear", "labels": cell.labels, "value": value}]
        return {"contestant": cell.contestant, "rows": rows}
    trained = _training(cell.contestant)(settings, prepared, out, cell.seed)
    print(f"{cell.kind}: probing", flush=True)
    dtype, context = precision.resolve("auto", "cpu"), Context(out)
    test = photos.extract(trained.backbone, prepared.splits["clothing"].test, context, settings.threads, dtype)
    return {
        "contestant": cell.contestant,
        "steps": trained.steps,
        "wall_s": trained.wall_s,
        "cpu_s": trained.cpu_s,
        **_told(out / "runs" / f"{cell.kind}_seed{cell.seed}"),
        "effective_rank": float(diagnostics.effective_rank(torch.from_numpy(test.x - test.x.mean(0)))),
        "rows": photos.probe(trained.backbone, prepared, context, settings.threads, dtype),
    }


def _training(name: str) -> Callable[[Settings, photos.Photos, Path, int], contestants.Trained]:
    if name == "random":
        return contestants.untrained
    if name == "lightly":
        import lightly_simclr  # and with it lightly, which the others' processes do not want

        return lightly_simclr.train
    return functools.partial(contestants.pretrained, name)


def _told(run_dir: Path) -> dict[str, float]:
    """What one of our runs says of itself at its end, and its speed: the median over the lines of its log."""
    rows = monitor.read_jsonl(run_dir / monitor.METRICS)
    if not rows:
        return {}
    told = {key: rows[-1][key] for key in ("loss", "accuracy") if key in rows[-1]}
    return told | {"images_per_s": float(np.median([row["images_per_s"] for row in rows[1:] or rows]))}


def main(
    description: str | None,
    contestants: Sequence[str],
    num_seeds: int,
    render: Callable[[Sequence[dict[str, Any]], Settings], str],
) -> None:
    """The command line of a benchmark of these contestants; render: rows and settings -> Markdown."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS, help="finished contestants and seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/photos"), help="runs and packed photos")
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="of pretraining")
    parser.add_argument("--seeds", type=int, default=num_seeds)
    parser.add_argument("--width", type=int, default=Settings.width, help="channels of the first stage")
    parser.add_argument(
        "--threads", type=int, default=Settings.threads, help="of torch, of DALI, and DataLoader workers"
    )
    parser.add_argument("--images", type=int, help="pretrain on so many only, to try the benchmark out")
    parser.add_argument("--only", help="these contestants, comma-separated; 'table': none")
    args = parser.parse_args()
    chosen = [name for name in contestants if args.only is None or name in args.only.split(",")]
    settings = Settings(epochs=args.epochs, threads=args.threads, images=args.images, width=args.width)
    cells.claim(args.rows, settings)
    if chosen:
        out = args.out.resolve()
        run = functools.partial(run_cell, settings, photos.prepare(out, settings.images), out)
        cells.work(plan(chosen, args.seeds), run, args.rows.resolve())
    print(render(cells.read(args.rows), settings))
