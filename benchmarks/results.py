"""What did pretraining buy? Every method on every task, beside the untrained network and one trained on the labels.

Command: python benchmarks/results.py         (make results; --help for the rest; run again, it goes on)

The runs are learn.py's: the same photos, backbone and steps for every method; one that is not there is trained first.
Every figure is the product's own evaluation, kept in the run's folder. Rows are copied to benchmarks/results, a folder
a method and seed of pretraining, and two tables are made of those there are: the figures of the first seed, with
intervals over label subsets and heads; and what pretraining adds, with intervals over seeds of pretraining.
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
from distssl.config import Run
from distssl.context import Context
from distssl.downstream.rows import BACKBONES, Row, read_summary, write_summary

METHODS = ("simclr", "moco_v2", "byol", "barlow_twins", "vicreg", "vibcreg", "rotation", "deepcluster_v2")
REFERENCES = tuple(name for name in BACKBONES if name != "pretrained")
ROWS = Path(__file__).parent / "results"

Found = dict[tuple[str, int], list[Row]]  # by method and seed
Place = tuple[str, str, str, str]  # data, task, amount of labels, metric
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


def examine(run: Run, name: str, exam: Exam, splits: dict[str, photos.Split]) -> list[Row]:
    """The rows of one method's run on one data set; of the first method, those of all backbones."""
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


def complete(
    name: str,
    seed: int,
    exams: Sequence[Exam],
    settings: Settings,
    prepared: photos.Photos,
    out: Path,
    splits: dict[str, photos.Split],
) -> None:
    """Train a method and examine it, as far as that is not done yet."""
    contestants.pretrained(name, settings, prepared, out, seed)
    run = contestants.run_of(name, settings, prepared, out, seed)
    folder = ROWS / f"{name}_seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for exam in exams:
        if not any(row.data == f"{exam.data}_train" for row in read_summary(folder)):
            print(f"{name}, seed {seed}: {exam.data}", flush=True)
            write_summary(folder, examine(run, name, exam, splits))


def render(found: Found) -> str:
    """Markdown: a line a task, a column a backbone; then what each method of several seeds adds."""
    places = [place for exam in EXAMS for place in _places(exam, found)]
    titles = [_title(place) for place in places]
    columns_of = {name: rows for name in (*REFERENCES, *METHODS) if (rows := _of(found, name, 0))}
    lines = [provenance.describe(), "", f"| | {' | '.join(columns_of)} |", "|---" * (len(columns_of) + 1) + "|"]
    for place, title in zip(places, titles, strict=True):
        texts = [report.shown(rows[place]) if place in rows else "" for rows in columns_of.values()]
        lines.append(f"| {title} | {' | '.join(texts)} |")
    several = [name for name in METHODS if (name, 1) in found]
    columns = [(name, reference) for name in several for reference in REFERENCES]
    if columns:
        lines += ["", f"| | {' | '.join(f'{name} - {reference}' for name, reference in columns)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for place, title in zip(places, titles, strict=True):
            lines.append(f"| {title} | {' | '.join(_added(found, *column, place) for column in columns)} |")
    return "\n".join(lines) + "\n"


def _added(found: Found, name: str, reference: str, place: Place) -> str:
    """The difference of the means of each seed; bold where its interval excludes zero."""
    seeds = [seed for other, seed in sorted(found) if other == name]
    pairs = [(_of(found, name, seed), _of(found, reference, seed)) for seed in seeds]
    values = [mine[place].value - theirs[place].value for mine, theirs in pairs if place in mine and place in theirs]
    if not values:
        return ""
    row = Row("", "", None, place[3], tuple(values))
    is_sure = row.interval is not None and abs(row.value) > row.interval
    text = f"{report.shown(row)} (n = {len(values)})"
    return f"**{text}**" if is_sure else text


def _of(found: Found, name: str, seed: int) -> dict[Place, Row]:
    """The rows of a method, or of a reference, which the first method's evaluations have."""
    method_of, backbone = (METHODS[0], name) if name in REFERENCES else (name, "pretrained")
    return {_place(row): row for row in found.get((method_of, seed), []) if row.backbone == backbone}


def _place(row: Row) -> Place:
    return row.data, row.task, row.amount, row.metric


def _title(place: Place) -> str:
    data, *rest = place
    return " ".join([data.removesuffix("_train"), *rest])


def _places(exam: Exam, found: Found) -> Iterator[Place]:
    places = dict.fromkeys(_place(row) for rows in found.values() for row in rows)
    return (place for place in places if place[0] == f"{exam.data}_train" and (place[1], place[3]) in exam.metrics)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sets"), help="runs and packed images")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; 'table': none")
    parser.add_argument("--data", default=",".join(exam.data for exam in EXAMS), help="data sets, comma-separated")
    parser.add_argument("--seeds", type=int, default=1, help="of pretraining")
    parser.add_argument("--threads", type=int, default=Settings.threads)
    args = parser.parse_args(arguments)
    settings, out = Settings(threads=args.threads), args.out.resolve()
    if args.methods != "table":
        prepared = photos.prepare(out, settings.images)
        splits = prepared.splits | labelled_sets.prepare(out)
        exams = [exam for exam in EXAMS if exam.data in args.data.split(",")]
        for seed in range(args.seeds):
            for name in args.methods.split(","):
                complete(name, seed, exams, settings, prepared, out, splits)
    print(render(read()))


def read() -> Found:
    """What there is so far."""
    folders = [folder for folder in ROWS.glob("*_seed*") if folder.is_dir()]
    return {
        (folder.name.rpartition("_")[0], int(folder.name.rpartition("_seed")[2])): read_summary(folder)
        for folder in folders
    }


if __name__ == "__main__":
    main()
