"""Several runs side by side: what each was, what its evaluation says, how it went."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from distssl import config, monitor, run_folder
from distssl.config import Run
from distssl.downstream import pictures, rows
from distssl.downstream.rows import BACKBONES, LOWER_IS_BETTER, Row
from distssl.errors import ConfigError

Curve = list[tuple[float, float]]  # (step, value), ascending in step

MAIN_METRICS = ("loss", "knn")  # of metrics.jsonl: those that are shown first


class Column(NamedTuple):
    """What a figure is of. labels: how many, None for all; amount: the same for people."""

    data: str
    task: str
    metric: str
    labels: int | None
    amount: str

    @classmethod
    def of(cls, row: Row) -> Column:
        return cls(row.data, row.task, row.metric, row.labels, row.amount)

    @property
    def names(self) -> tuple[str, str, str]:
        return self.data, self.task, self.metric


@dataclass(frozen=True)
class Member:
    """One of the runs. name: the run folder's, with as many folders above it as tell it from the others."""

    name: str
    folder: Path
    run: Run
    rows: list[Row]
    metrics: list[dict[str, Any]]

    @property
    def pictures(self) -> list[Path]:
        return sorted((self.folder / pictures.FOLDER).glob("*.png"))

    @property
    def projector(self) -> Path:
        return self.folder / pictures.FOLDER / pictures.PROJECTOR


@dataclass(frozen=True)
class Line:
    """A row of the table: the pretrained backbone of one run, or a random or supervised one that some runs share."""

    backbone: str
    runs: list[str]
    cells: dict[Column, Row] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class Comparison:
    """members, lines and columns in the order they are shown in. settings: what differs, a value a member."""

    members: list[Member]
    lines: list[Line]
    columns: list[Column]
    settings: dict[str, list[Any]]

    def best(self, column: Column) -> float | None:
        """The best value of a column, None where it has not two to compare."""
        values = [line.cells[column].value for line in self.lines if column in line.cells]
        values = [value for value in values if math.isfinite(value)]
        if len(values) < 2:
            return None
        return min(values) if column.metric in LOWER_IS_BETTER else max(values)

    def is_best(self, line: Line, column: Column) -> bool:
        return column in line.cells and line.cells[column].value == self.best(column)

    def by_labels(self) -> list[tuple[tuple[str, str, str], list[Column]]]:
        """The names of what was evaluated at several numbers of labels, with its columns, fewest labels first."""
        groups = itertools.groupby(self.columns, key=lambda column: column.names)
        return [(names, columns) for names, group in groups for columns in [list(group)] if len(columns) > 1]

    def curves(self) -> dict[str, dict[str, Curve]]:
        """{metric: {member's name: curve}} of metrics.jsonl, the main metrics first."""
        found: dict[str, dict[str, Curve]] = {name: {} for name in MAIN_METRICS}
        for member in self.members:
            for line in member.metrics:
                for name, value in line.items():
                    if name != "step":
                        found.setdefault(name, {}).setdefault(member.name, []).append((line["step"], value))
        return {name: curves for name, curves in found.items() if curves}


def collect(folders: Sequence[Path]) -> Comparison:
    """Read run folders. Raises ConfigError for folders that are none, and where no run has been evaluated."""
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    missing = [folder for folder in folders if not (folder / run_folder.CONFIG).is_file()]
    if missing:
        raise ConfigError(
            *(f"{folder}: no run there; a run folder with {run_folder.CONFIG} is right" for folder in missing)
        )
    members = _named_apart([_member(name, folder) for name, folder in zip(_names(folders), folders, strict=True)])
    if not any(member.rows for member in members):
        where = ", ".join(str(folder) for folder in folders)
        raise ConfigError(f"{where}: no {rows.SUMMARY} with figures; say python launch.py evaluate RUN first")
    lines = [Line("pretrained", [member.name], _cells(member, "pretrained"), member.name) for member in members]
    for backbone in BACKBONES:
        if backbone != "pretrained":
            lines += _shared(members, backbone)
    return Comparison(members, lines, _columns(members), _settings(members))


def _member(name: str, folder: Path) -> Member:
    path = folder / run_folder.CONFIG
    run = config.parse(path.read_text(), path)
    return Member(name, folder, run, rows.read_summary(folder), monitor.read_jsonl(folder / monitor.METRICS))


def _named_apart(members: list[Member]) -> list[Member]:
    """With names of their data that no two data sets have."""
    every = iter(rows.told_apart([row for member in members for row in member.rows]))
    return [replace(member, rows=list(itertools.islice(every, len(member.rows)))) for member in members]


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of the paths, of as many parts each, that differ."""
    num = 1
    while len({folder.parts[-num:] for folder in folders}) < len(folders):
        num += 1
    return ["/".join(folder.parts[-num:]) for folder in folders]


def _cells(member: Member, backbone: str) -> dict[Column, Row]:
    return {Column.of(row): row for row in member.rows if row.backbone == backbone}


def _shared(members: list[Member], backbone: str) -> list[Line]:
    """Runs whose backbone, seed and figures agree in all that they have in common share a line."""
    lines: list[Line] = []
    starts: list[tuple[config.Model, int]] = []
    for member in members:
        cells, start = _cells(member, backbone), (member.run.model.untrained, member.run.seed)
        if not cells:
            continue
        for line, other in zip(lines, starts, strict=True):
            common = cells.keys() & line.cells.keys()
            if start == other and common and all(cells[key] == line.cells[key] for key in common):
                line.cells.update(cells)
                line.runs.append(member.name)
                break
        else:
            lines.append(Line(backbone, [member.name], cells))
            starts.append(start)
    if len(lines) == 1:
        return [Line(backbone, lines[0].runs, lines[0].cells, backbone)]
    return [Line(backbone, line.runs, line.cells, f"{backbone} ({_listed(line.runs)})") for line in lines]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _columns(members: list[Member]) -> list[Column]:
    """Datasets and metrics as they come, tasks as the schema has them, labels upwards."""
    found = list(dict.fromkeys(Column.of(row) for member in members for row in member.rows))
    data, tasks, metrics = ([*dict.fromkeys(part)] for part in list(zip(*found, strict=True))[:3])
    tasks.sort(key=lambda task: config.TASKS.index(task) if task in config.TASKS else len(config.TASKS))

    def place(column: Column) -> tuple[float, ...]:
        labels = math.inf if column.labels is None else column.labels
        return data.index(column.data), tasks.index(column.task), metrics.index(column.metric), labels

    return sorted(found, key=place)


def _settings(members: list[Member]) -> dict[str, list[Any]]:
    """The method, and whatever else decides the result and differs; "" where a method has no such option."""
    trees = [config.science(member.run) for member in members]
    keys = ["method.name", *(key for tree in trees for key in tree)]
    values = {key: [tree.get(key, "") for tree in trees] for key in dict.fromkeys(keys)}
    return {
        key: found for key, found in values.items() if key == "method.name" or any(value != found[0] for value in found)
    }


def setting(value: Any) -> str:
    """A setting as it is said on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
