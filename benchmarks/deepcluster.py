"""DeepCluster's three plots on small photos: what clusters know of labels, how they settle, how many there should be.

Figure 2 of Caron et al., ECCV 2018, https://arxiv.org/abs/1807.05520: (a) NMI of clusters and labels over epochs, (b)
NMI of clusters and those of the epoch before, (c) accuracy of probes, here beside the last NMI, against k.

Command: python benchmarks/deepcluster.py      (--help for the rest; run again, it goes on and skips what it has)

Photos, backbone and optimiser are those of learn.py, and so are the options but for k. Labels are those of clothing and
groceries together; they are looked at and not learned from. A finished k and seed is a JSON file in
benchmarks/rows_deepcluster; table and deepcluster.html are made of those there are.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import contestants
import numpy as np
import photos
import provenance
import torch
from contestants import Settings

from distssl import config, job, monitor, page, run_folder, svg
from distssl.context import Context
from distssl.data import indexing, shards
from distssl.nn import precision

ROWS = Path(__file__).parent / "rows_deepcluster"
CLUSTERS = (30, 100, 300, 1000, 3000)
FIGURES = ("nmi_labels", "nmi_previous", "reassigned", "entropy", "largest", "refilled", "trivial", "seconds")
SHOWN = [("clothing", "20-NN", None), ("clothing", "linear", 1000), ("grocery", "linear", None)]


@dataclass(frozen=True)
class Cell:
    """One training."""

    clusters: int
    seed: int

    @property
    def kind(self) -> str:
        return f"k{self.clusters}"


def with_labels(out: Path) -> Path:
    """The photos that are pretrained on, packed with the labels they have."""
    folder = out / "packed" / "pretrain_labelled"
    if not (folder / indexing.DATASET).exists():
        labels: dict[str, str] = {}
        for name in ("clothing_train", "clothing_test", "grocery_train"):
            labels |= {path: f"{name.split('_')[0]}: {label}" for path, label in _read(out / f"{name}.csv")}
        table = out / "pretrain_labelled.csv"
        with open(table, "w", newline="") as file:
            rows = [(path, labels.get(path, "")) for path, _ in _read(out / "pretrain.csv")]
            csv.writer(file).writerows([("path", "label"), *rows])
        shards.pack(str(table), folder)
    return folder


def _read(path: Path) -> list[tuple[str, str]]:
    with open(path, newline="") as file:
        return [(row["path"], row["label"]) for row in csv.DictReader(file)]


def run_cell(settings: Settings, prepared: photos.Photos, packed: Path, out: Path, cell: Cell) -> dict[str, Any]:
    """Train and probe: the cell's row."""
    torch.set_num_threads(settings.threads)
    plain = contestants.run_of("deepcluster", settings, prepared, out, cell.seed)
    options = plain.method.options | {"clusters": cell.clusters}
    run = plain.model_copy(
        update={
            "name": f"deepcluster_{cell.kind}_seed{cell.seed}",
            "data": plain.data.model_copy(update={"source": str(packed)}),
            "method": config.Method(name="deepcluster", **options),
        }
    )
    with Context(run.run_dir) as context:
        job.pretrain(run, context, job.prepare(run, 1))
    backbone = contestants.placed(run_folder.trained(run, run.run_dir).evaluated())
    rows = photos.probe(backbone, prepared, Context(out), settings.threads, precision.resolve("auto", "cpu"))
    logged = [row for row in monitor.read_jsonl(run.run_dir / monitor.METRICS) if "clusters/nmi_labels" in row]
    epochs = [{name: row[f"clusters/{name}"] for name in FIGURES if f"clusters/{name}" in row} for row in logged]
    return {"clusters": cell.clusters, "epochs": epochs, "rows": rows}


def render(found: Sequence[dict[str, Any]], settings: Settings) -> str:
    """Markdown."""
    lines = [
        provenance.describe(),
        f"- settings: {settings}; photos of {photos.SIZE_PX} px; NMI at the first and last epoch's start",
        "",
        "| k | n | NMI with labels | NMI with the epoch before | re-assigned, last | "
        + " | ".join(f"{data} {task} {labels or 'all'}" for data, task, labels in SHOWN)
        + " | clustering, s an epoch |",
        "|---|" + "---|" * (len(SHOWN) + 5),
    ]
    for k in sorted({row["clusters"] for row in found}):
        mine = [row for row in found if row["clusters"] == k]
        last = [row["epochs"][-1] for row in mine]
        columns = [
            f"{k}" + (" **trivial**" if any(epoch["trivial"] for epoch in last) else ""),
            f"{len(mine)}",
            f"{_spread([row['epochs'][0]['nmi_labels'] for row in mine])} to "
            + _spread([epoch["nmi_labels"] for epoch in last]),
            _spread([epoch["nmi_previous"] for epoch in last if "nmi_previous" in epoch]),
            _spread([epoch["reassigned"] for epoch in last if "reassigned" in epoch], "{:.0f}"),
            *(_spread([100 * value for row in mine for value in _values(row, place)], "{:.1f}") for place in SHOWN),
            _spread([epoch["seconds"] for row in mine for epoch in row["epochs"]], "{:.1f}"),
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def _values(row: dict[str, Any], place: tuple[str, str, int | None]) -> list[float]:
    return [r["value"] for r in row["rows"] if (r["data"], r["task"], r["labels"]) == place]


def _spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """median [min, max], the bracket where there are several."""
    if not values:
        return ""
    median = form.format(float(np.median(values)))
    return median + (f" [{form.format(min(values))}, {form.format(max(values))}]" if len(values) > 1 else "")


def plots(found: Sequence[dict[str, Any]]) -> str:
    """A page with the three plots."""
    ks = sorted({row["clusters"] for row in found})
    by_k = {"NMI with labels": [(k, float(np.mean(_last(found, k)))) for k in ks]}
    for at in SHOWN:
        by_k[f"{at[0]} {at[1]}"] = [
            (k, float(np.mean([v for row in found if row["clusters"] == k for v in _values(row, at)]))) for k in ks
        ]
    over_epochs = [
        svg.chart(title, "epoch", title, _series({f"k = {k}": _course(found, k, figure) for k in ks}))
        for title, figure in (("NMI with labels", "nmi_labels"), ("NMI with the epoch before", "nmi_previous"))
    ]
    charts = [*over_epochs, svg.chart("influence of k", "k", "NMI or accuracy", _series(by_k), log_x=True)]
    return page.document("DeepCluster", ['<div class="cards">', *charts, "</div>"])


def _series(lines: Mapping[str, Sequence[tuple[float, float]]]) -> list[svg.Series]:
    return [
        svg.Series(name, [svg.Point(x, y) for x, y in line], f"c{nth % svg.NUM_COLOURS}", nth)
        for nth, (name, line) in enumerate(lines.items())
    ]


def _course(found: Sequence[dict[str, Any]], k: int, figure: str) -> list[tuple[float, float]]:
    """(epoch, mean over seeds) where all seeds have the figure."""
    courses = [[epoch.get(figure) for epoch in row["epochs"]] for row in found if row["clusters"] == k]
    means = [(e, values) for e, values in enumerate(zip(*courses, strict=False)) if None not in values]
    return [(e, float(np.mean(values))) for e, values in means]


def _last(found: Sequence[dict[str, Any]], k: int) -> list[float]:
    return [row["epochs"][-1]["nmi_labels"] for row in found if row["clusters"] == k]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS, help="finished trainings")
    parser.add_argument("--out", type=Path, default=Path("runs/photos"), help="runs and packed photos")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--clusters", default=",".join(map(str, CLUSTERS)), help="comma-separated; '': only the table")
    parser.add_argument("--threads", type=int, default=Settings.threads)
    parser.add_argument("--width", type=int, default=Settings.width, help="channels of the first stage")
    parser.add_argument("--images", type=int, help="pretrain on so many only, to try the benchmark out")
    args = parser.parse_args()
    settings = dataclasses.replace(
        Settings(), epochs=args.epochs, threads=args.threads, images=args.images, width=args.width
    )
    cells.claim(args.rows, settings)
    chosen = [int(k) for k in args.clusters.split(",") if k]
    if chosen:
        out = args.out.resolve()
        prepared = photos.prepare(out, settings.images)
        run = functools.partial(run_cell, settings, prepared, with_labels(out), out)
        cells.work([Cell(k, seed) for seed in range(args.seeds) for k in chosen], run, args.rows.resolve())
    found = cells.read(args.rows)
    (args.rows / "deepcluster.html").write_text(plots(found))
    print(render(found, settings))


if __name__ == "__main__":
    main()
