"""Does every method learn? Each on the same photos, network, optimiser and steps, beside random and supervised ones.

Command: python benchmarks/learn.py            (--help for the rest; run again, it goes on and skips what it has)

The photos, backbone and probes are those of peer_simclr; the methods' options are recipes.py's. A finished method and
seed is a JSON file in OUT/rows; the table is made of those there are.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import from_scratch
import numpy as np
import photos
import provenance
import recipes
import torch
from contestants import Settings, placed, pretrain, untrained

from distssl import config, job, method, monitor
from distssl.config import Run
from distssl.context import Context
from distssl.data.shards import Dataset
from distssl.nn import diagnostics, precision

BASELINES = ("random", "supervised")
CHANCE = {"rotation": 1 / 4, "jigsaw": 1 / 100, "relative_position": 1 / 8, "corruption": 1 / 10}
COLLAPSED = 2.0  # an effective rank below it
COLUMNS = [("clothing", "20-NN", None), ("clothing", "linear", 100), ("clothing", "linear", 1000)]
COLUMNS += [("grocery", "linear", 1000), ("grocery", "linear", None)]


@dataclass(frozen=True)
class Cell:
    """One method, or baseline, and seed."""

    kind: str
    seed: int


def run_of(name: str, settings: Settings, prepared: photos.Photos, out: Path, seed: int) -> Run:
    labelled = method.find(name).learns_from_labels
    tree: dict[str, Any] = {
        "name": f"{name}_seed{seed}",
        "seed": seed,
        "data": {
            "source": str(prepared.packed),
            "global_batch": settings.batch,
            **({"labelled": str(prepared.splits["clothing"].train), "num_labelled": 1000} if labelled else {}),
        },
        "method": {"name": name, **recipes.OPTIONS[name]},
        "model": {"backbone": "resnet10", "stem": "3x3_s2"},
        "train": {
            "epochs": settings.epochs,
            "optimizer": "adamw",
            "lr": settings.lr,
            "weight_decay": settings.weight_decay,
            "warmup_epochs": 0.1 * settings.epochs,
        },
        "eval": {"every": None, "tasks": []},
        "checkpoint": {"every": 60},
        "machine": {
            "workers": 0,
            "threads": settings.threads,
            "storage": str(out / "runs"),
            "cache": str(out / "cache"),
        },
    }
    return config.load(None, [f"{key}={json.dumps(value)}" for key, value in tree.items()], method.options)


def run_cell(settings: Settings, prepared: photos.Photos, out: Path, cell: Cell) -> dict[str, Any]:
    """Train and probe: the cell's row."""
    torch.set_num_threads(settings.threads)
    row: dict[str, Any] = {"method": cell.kind}
    if cell.kind == "supervised":
        return row | {"rows": _supervised(settings, prepared, out, cell.seed)}
    if cell.kind == "random":
        net = untrained(settings, prepared, out, cell.seed).backbone
    else:
        run = run_of(cell.kind, settings, prepared, out, cell.seed)
        pretrain(run)
        net = job.trained(run, run.run_dir).evaluated()
        row |= _told(run)
    dtype, context = precision.resolve("auto", "cpu"), Context(out)
    row["rows"] = photos.probe(placed(net), prepared, context, settings.threads, dtype)
    test = photos.extract(net, prepared.splits["clothing"].test, context, settings.threads, dtype)
    row["effective_rank"] = float(diagnostics.effective_rank(torch.from_numpy(test.x - test.x.mean(0))))
    return row


def _told(run: Run) -> dict[str, float]:
    """What a run says of itself at its end, and its speed."""
    rows = monitor.read_jsonl(run.run_dir / monitor.METRICS)
    told = {key: rows[-1][key] for key in ("loss", "accuracy") if key in rows[-1]}
    return told | {"images_per_s": float(np.median([row["images_per_s"] for row in rows[1:] or rows]))}


def _supervised(settings: Settings, prepared: photos.Photos, out: Path, seed: int) -> list[dict[str, Any]]:
    rows = []
    for data, task, labels in COLUMNS:
        if task == "linear":
            value = from_scratch.accuracy(settings, prepared, out, seed, data=data, labels=labels)
            rows.append({"data": data, "task": task, "labels": labels, "value": value})
    return rows


def render(out: Path, settings: Settings, prepared: photos.Photos) -> str:
    """Markdown."""
    found = cells.rows(out)
    titles = [f"{data} {task} {labels or 'all'}" for data, task, labels in COLUMNS]
    lines = [
        provenance.describe(),
        f"- settings: {settings}; {Dataset.open(prepared.packed).num_samples} photos of {photos.SIZE_PX} px",
        "",
        "| method | n | pretext accuracy (chance) | " + " | ".join(titles) + " | effective rank | images/s |",
        "|---|" + "---|" * (len(titles) + 4),
    ]
    for name in (*BASELINES, *recipes.OPTIONS):
        mine = [row for row in found if row["method"] == name]
        if mine:
            lines.append(_line(name, mine))
    return "\n".join(lines) + "\n"


def _line(name: str, mine: Sequence[dict[str, Any]]) -> str:
    accuracy = _percent([row["accuracy"] for row in mine if name in CHANCE])
    ranks = [row["effective_rank"] for row in mine if "effective_rank" in row]
    columns = [
        name + (" **collapsed**" if ranks and np.mean(ranks) < COLLAPSED else ""),
        str(len(mine)),
        f"{accuracy} ({100 * CHANCE[name]:.0f})" if accuracy else "",
    ]
    for data, task, labels in COLUMNS:
        place = (data, task, labels)
        columns.append(
            _percent([r["value"] for row in mine for r in row["rows"] if (r["data"], r["task"], r["labels"]) == place])
        )
    columns.append(f"{np.mean(ranks):.0f}" if ranks else "")
    columns.append(f"{np.mean([row['images_per_s'] for row in mine]):.0f}" if "images_per_s" in mine[0] else "")
    return "| " + " | ".join(columns) + " |"


def _percent(values: Sequence[float]) -> str:
    """Mean and, of two or more, their largest distance from it."""
    if not values:
        return ""
    mean = 100 * float(np.mean(values))
    return f"{mean:.1f}" + (f" ± {100 * max(values) - mean:.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learn"), help="rows, runs and packed photos")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=Settings.threads, help="of torch and of DALI")
    parser.add_argument("--images", type=int, help="pretrain on so many only, to try the benchmark out")
    parser.add_argument("--only", help="these methods, comma-separated; 'table': none")
    args = parser.parse_args()
    settings = Settings(epochs=args.epochs, threads=args.threads, images=args.images)
    out = args.out.resolve()
    cells.claim(out, settings)
    prepared = photos.prepare(out, settings.images)
    names = args.only.split(",") if args.only else [*BASELINES, *recipes.OPTIONS]
    if args.only != "table":
        run = functools.partial(run_cell, settings, prepared, out)
        cells.work([Cell(name, seed) for seed in range(args.seeds) for name in names], run, out)
    text = render(out, settings, prepared)
    (out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
