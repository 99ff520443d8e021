"""What do images without labels add to few labels? 1,000 of grocery's, alone and beside all photos, by UDA.

Command: python benchmarks/semi_supervised.py      (--help for the rest; run again, it goes on and skips what it has)

Three contestants with the same 1,000 labels of a seed: supervised training on them alone (from_scratch.py), UDA on
them and all photos of learn.py, and the same UDA from the backbone that SimCLR has made of those photos. Photos,
backbone and optimiser are learn.py's, UDA's options recipes.py's. The figure is the accuracy of each one's own
classifier on grocery's test photos. A finished contestant and seed is a JSON file; the table is made of those that are
there.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import contestants
import from_scratch
import photos
import provenance
import torch
from contestants import Settings

from distssl import monitor, plan, run_folder
from distssl.config import Run
from distssl.data.shards import Dataset
from distssl.downstream.rows import Row
from distssl.methods.uda import UDA
from distssl.report import shown

ROWS = Path(__file__).parent / "results" / "semi_supervised"
DATA, NUM_LABELS = "grocery", 1000
TITLES = {
    "supervised": "supervised on the labels",
    "uda": "UDA from scratch",
    "uda_from_simclr": "UDA from the SimCLR backbone",
}


@dataclass(frozen=True)
class Cell:
    """One piece of work; kind: one of TITLES."""

    kind: str
    seed: int


def run_of(settings: Settings, prepared: photos.Photos, out: Path, kind: str, seed: int) -> Run:
    """UDA's config; that from SimCLR names SimCLR's run of the same seed."""
    train = prepared.splits[DATA].train
    more = [
        f"name={kind}_{DATA}_seed{seed}",
        f"data.labelled={train}",
        f"data.num_labelled={NUM_LABELS}",
        f"method.num_classes={len(Dataset.open(train).classes)}",
    ]
    if kind == "uda_from_simclr":
        more.append(f"model.init={contestants.run_of('simclr', settings, prepared, out, seed).run_dir}")
    return contestants.run_of("uda", settings, prepared, out, seed, *more)


def run_cell(settings: Settings, prepared: photos.Photos, out: Path, cell: Cell) -> dict[str, Any]:
    """Train and test: the cell's row."""
    torch.set_num_threads(settings.threads)
    row = {"contestant": cell.kind, "data": DATA, "labels": NUM_LABELS}
    if cell.kind == "supervised":
        uda = run_of(settings, prepared, out, "uda", cell.seed)
        ids = plan.of_labelled(uda, Dataset.open(prepared.splits[DATA].train), 1).ids
        where = settings, prepared, out, cell.seed
        return row | {"value": from_scratch.accuracy(*where, data=DATA, labels=NUM_LABELS, ids=ids)}
    if cell.kind == "uda_from_simclr":
        contestants.pretrained("simclr", settings, prepared, out, cell.seed)
    run = run_of(settings, prepared, out, cell.kind, cell.seed)
    done = contestants.trained(run)
    method = run_folder.trained(run, run.run_dir)
    last = monitor.read_jsonl(run.run_dir / monitor.METRICS)[-1]
    told = {key: last[key] for key in ("loss", "supervised", "consistency", "confident", "accuracy")}
    assert isinstance(method, UDA)
    value = from_scratch.of_classifier(method.backbone, method.classifier, prepared, out, settings, DATA)
    return row | {"value": value, "steps": done.steps, "cpu_s": done.cpu_s, "last_step": told}


def render(found: Sequence[dict[str, Any]], settings: Settings) -> str:
    """Markdown: means over seeds with their 95 % intervals, and how far each is above supervised, seed by seed."""
    values = {kind: {row["seed"]: row["value"] for row in found if row["contestant"] == kind} for kind in TITLES}
    lines = [provenance.describe(), f"- settings: {settings}", ""]
    lines += [f"| {DATA}, {NUM_LABELS} labels | n | accuracy, % | above supervised, points |", "|---|---|---|---|"]
    for kind, title in TITLES.items():
        both = sorted(values[kind].keys() & values["supervised"].keys())
        above = [values[kind][seed] - values["supervised"][seed] for seed in both] if kind != "supervised" else []
        lines.append(f"| {title} | {len(values[kind])} | {_mean([*values[kind].values()])} | {_mean(above)} |")
    return "\n".join(lines) + "\n"


def _mean(values: Sequence[float]) -> str:
    return shown(Row("", "", None, "", tuple(values))) if values else ""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS, help="finished contestants and seeds")
    parser.add_argument("--out", type=Path, default=Path("runs/sets"), help="runs and packed photos, as of results.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=Settings.epochs, help="of SimCLR and of UDA")
    parser.add_argument("--width", type=int, default=Settings.width, help="channels of the first stage")
    parser.add_argument("--threads", type=int, default=Settings.threads)
    parser.add_argument("--images", type=int, help="all photos are so many, to try the benchmark out")
    parser.add_argument("--only", default=",".join(TITLES), help="these contestants, comma-separated; 'table': none")
    args = parser.parse_args()
    settings = Settings(epochs=args.epochs, threads=args.threads, images=args.images, width=args.width)
    cells.claim(args.rows, settings)
    chosen = [Cell(kind, seed) for seed in range(args.seeds) for kind in TITLES if kind in args.only.split(",")]
    if chosen:
        out = args.out.resolve()
        run = functools.partial(run_cell, settings, photos.prepare(out, settings.images), out)
        cells.work(chosen, run, args.rows.resolve())
    print(render(cells.read(args.rows), settings))


if __name__ == "__main__":
    main()
