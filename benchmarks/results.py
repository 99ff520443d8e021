"""What did pretraining buy? Every method on every task, beside the untrained network and one trained on the labels.

Command: python benchmarks/results.py         (make results; --help for the rest; run again, it goes on)

The runs are learn.py's: the same photos, backbone and steps for every method; one that is not there is trained first.
Every figure is the product's own evaluation, kept in the run's folder. Rows are copied to benchmarks/results, a folder
a method, and the table is made of those there are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import contestants
import labelled_sets
import photos
import provenance
from contestants import Settings

from distssl import config, job, method, report, run_folder
from distssl.context import Context
from distssl.downstream.rows import BACKBONES, Row, read_summary, write_summary

METHODS = ("simclr", "moco_v2", "byol", "barlow_twins", "vicreg", "swav", "rotation", "deepcluster_v2")
ROWS = Path(__file__).parent / "results"
NUM_SEEDS = 3


@dataclass(frozen=True)
class Exam:
    """Tasks on one data set. settings: what the recipe here differs in from the product's, to fit this machine."""

    data: str
    tasks: tuple[str, ...]
    metrics: tuple[tuple[str, str], ...]  # (task, metric): the table's columns
    settings: tuple[str, ...] = ()
    gallery: str | None = None  # retrieval is from other images than the training ones


SMALL = ("eval.fit.steps=200", "eval.fit.size_px=64")
EXAMS = (
    Exam(
        "clothing",
        ("knn", "linear", "cluster", "finetune"),
        (("knn", "accuracy"), ("linear", "accuracy"), ("cluster", "nmi"), ("finetune", "accuracy")),
        (*SMALL, 'eval.labels=["10/class", "10%", null]', "eval.crop=1.0"),
    ),
    Exam("grocery", ("retrieval",), (("retrieval", "map"), ("retrieval", "recall_at_1")), ("eval.crop=1.0",)),
    Exam("nuclei", ("segment",), (("segment", "miou"),), ("eval.fit.steps=200", "eval.fit.batch=16")),
    Exam("openfield", ("keypoints",), (("keypoints", "pck_0.1"),), ("eval.fit.steps=200", "eval.fit.batch=16")),
    Exam(
        "scenes", ("depth",), (("depth", "delta_1"), ("depth", "abs_rel")), ("eval.fit.steps=200", "eval.fit.batch=16")
    ),
    Exam(
        "bccd", ("detect",), (("detect", "ap50"),), ("eval.fit.steps=150", "eval.fit.batch=8", "eval.fit.size_px=192")
    ),
)


def examine(
    name: str, exam: Exam, settings: Settings, prepared: photos.Photos, out: Path, splits: dict[str, photos.Split]
) -> list[Row]:
    """The rows of one method on one data set; of the first method, those of all backbones."""
    run = contestants.run_of(name, settings, prepared, out, seed=0)
    backbones = BACKBONES if name == METHODS[0] else ("pretrained",)
    split = splits[exam.data]
    changes = [
        f"eval.source={split.train}",
        f"eval.test_source={split.test}",
        f"eval.num_seeds={NUM_SEEDS}",
        f"eval.backbones={json.dumps(backbones)}",
        *exam.settings,
    ]
    loaded = config.load(run.run_dir / run_folder.CONFIG, changes, method.options)
    with Context(run.run_dir) as context:
        job.evaluate_run(loaded, context, exam.tasks)
    return [row for row in read_summary(run.run_dir) if row.data == Path(split.train).name and row.task in exam.tasks]


def render(found: dict[str, list[Row]]) -> str:
    """Markdown: a line a backbone, a column a task; bold: the best."""
    lines = {
        name: rows for name in BACKBONES if name != "pretrained" for rows in [_of(found, METHODS[0], name)] if rows
    }
    lines |= {name: _of(found, name, "pretrained") for name in METHODS if name in found}
    columns = [column for exam in EXAMS for column in _columns(exam, found)]
    titles = [
        f"{data.removesuffix('_train')} {task} {labels or 'all'} {metric}" for data, task, labels, metric in columns
    ]
    table = [provenance.describe(), "", "| backbone | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, rows in lines.items():
        by_place = {(row.data, row.task, row.labels, row.metric): row for row in rows}
        texts = [report.shown(by_place[column]) if column in by_place else "" for column in columns]
        table.append("| " + " | ".join([name, *texts]) + " |")
    return "\n".join(table) + "\n"


def _of(found: dict[str, list[Row]], run: str, backbone: str) -> list[Row]:
    return [row for row in found.get(run, []) if row.backbone == backbone]


def _columns(exam: Exam, found: dict[str, list[Row]]) -> Iterator[tuple[str, str, int | None, str]]:
    every = [row for rows in found.values() for row in rows]
    places = dict.fromkeys((row.data, row.task, row.labels, row.metric) for row in every)
    return (place for place in places if place[0] == f"{exam.data}_train" and (place[1], place[3]) in exam.metrics)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sets"), help="runs and packed images")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; 'table': none")
    parser.add_argument("--threads", type=int, default=Settings.threads)
    args = parser.parse_args(arguments)
    settings, out = Settings(threads=args.threads), args.out.resolve()
    if args.methods != "table":
        prepared = photos.prepare(out, settings.images)
        splits = prepared.splits | labelled_sets.prepare(out)
        for name in args.methods.split(","):
            contestants.pretrained(name, settings, prepared, out, seed=0)
            folder = ROWS / name
            folder.mkdir(parents=True, exist_ok=True)
            for exam in EXAMS:
                if not any(row.data == f"{exam.data}_train" for row in read_summary(folder)):
                    print(f"{name}: {exam.data}", flush=True)
                    write_summary(folder, examine(name, exam, settings, prepared, out, splits))
    print(render({folder.name: read_summary(folder) for folder in sorted(ROWS.glob("*"))}))


if __name__ == "__main__":
    main()
