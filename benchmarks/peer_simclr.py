"""SimCLR by distssl and by lightly on the same photos, steps and probes, beside a random and a supervised network.

Command: python benchmarks/peer_simclr.py            (--help for the rest; run again, it goes on where it was)

Pretraining sees 8,038 photos at 64 px without labels, those of the clothing test senders among them; grocery's test
photos are not. The probes are distssl.downstream's, on frozen features, for every backbone alike. Every finished
contestant and seed is a JSON file in OUT/rows, trained and probed in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import contestants
import from_scratch
import peer_table
import photos
import torch
from contestants import Settings

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


def plan_cells(seeds: int, only: str | None) -> list[Cell]:
    """Seed by seed and within a seed one after the other, so that a drift of the machine meets all alike."""
    planned = []
    for seed in range(seeds):
        for method in METHODS:
            if only not in (None, method):
                continue
            if method == "supervised":
                planned += [Cell(method, seed, data, num) for data, nums in photos.LABELS.items() for num in nums]
            else:
                planned.append(Cell(method, seed))
    return planned


def run_cell(settings: Settings, prepared: photos.Photos, out: Path, cell: Cell) -> dict[str, Any]:
    """Train and probe: the cell's row."""
    torch.set_num_threads(settings.threads)
    if cell.method == "supervised":
        value = from_scratch.accuracy(settings, prepared, out, cell.seed, data=cell.data, labels=cell.labels)
        rows = [{"data": cell.data, "task": "supervised", "labels": cell.labels, "value": value}]
        return {"method": cell.method, "rows": rows}
    trained = _pretraining(cell.method)(settings, prepared, out, cell.seed)
    print(f"{cell.kind}: probing", flush=True)
    rows = photos.probe(trained.backbone, prepared, Context(out), settings.threads, precision.resolve("auto", "cpu"))
    cost = {"steps": trained.steps, "wall_s": trained.wall_s, "cpu_s": trained.cpu_s}
    return {"method": cell.method, **cost, "rows": rows}


def _pretraining(name: str) -> Callable[[Settings, photos.Photos, Path, int], contestants.Trained]:
    if name == "lightly":
        import lightly_simclr  # and with it lightly, which the others' processes do not want

        return lightly_simclr.train
    return {"random": contestants.untrained, "ours": contestants.ours}[name]


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
    cells.claim(out, settings)
    if args.only != "table":
        prepared = photos.prepare(out, settings.images)
        run = functools.partial(run_cell, settings, prepared, out)
        cells.work(plan_cells(args.seeds, args.only), run, out)
    text = peer_table.render(out, settings)
    (out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
