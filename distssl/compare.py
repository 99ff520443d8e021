"""Several runs side by side: what each was, what its evaluation says, how it went; as data and in the terminal."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distssl import config, monitor, report, run_folder
from distssl.config import Run
from distssl.downstream import pictures, rows
from distssl.downstream.rows import BACKBONES, LOWER_IS_BETTER, Row
from distssl.errors import ConfigError

Curve = list[tuple[float, float]]  # (step, value), ascending in step

MAIN_METRICS = ("loss", "knn")  # of metrics.jsonl: those that are shown first
BARS = "▁▂▃▄▅▆▇█"
NUM_BARS = 24


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
    try:
        run = config.parse((folder / run_folder.CONFIG).read_text())
    except ConfigError as error:
        raise ConfigError(*(f"{folder / run_folder.CONFIG}: {message}" for message in error.messages)) from None
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


def show(comparison: Comparison, console: Console) -> None:
    """The table, in parts where it is too wide; training curves; where the pictures are."""
    for columns in _parts(comparison, console):
        console.print(_table(comparison, columns))
    curves = comparison.curves()
    if any(name in curves for name in MAIN_METRICS):
        console.print(_curves(curves))
    for member in comparison.members:
        if member.pictures:
            folder = member.pictures[0].parent
            names = ", ".join(path.name for path in member.pictures)
            said = f"pictures in {folder}: {names}"
            console.print(said, soft_wrap=True, markup=False, highlight=False)


def _parts(comparison: Comparison, console: Console) -> list[list[Column]]:
    """All columns where they fit, else those of a task, and of these as many as fit."""

    unlimited = console.options.update(width=1_000_000)

    def fits(columns: list[Column]) -> bool:
        return console.measure(_table(comparison, columns), options=unlimited).maximum <= console.width

    if fits(comparison.columns):
        return [comparison.columns]
    parts: list[list[Column]] = []
    for column in comparison.columns:
        part = parts[-1] if parts else []
        if part and part[-1].names[:2] == column.names[:2] and fits([*part, column]):
            part.append(column)
        else:
            parts.append([column])
    return parts


def _table(comparison: Comparison, columns: list[Column]) -> Table:
    """Lines that have a figure in one of the columns; what all columns share stands in the title."""
    num_shared = 2 if len({column.names[:2] for column in columns}) == 1 else 0
    title = " ".join(part for part in columns[0].names[:num_shared] if part)
    drawn = Table(title=f"{title}: best in bold, ± 95 % interval" if title else "best in bold, ± 95 % interval")
    heads = ["labels" if i == 3 else Column._fields[i] for i in range(num_shared, 4)]
    drawn.add_column(Text("\n".join(heads), style="not bold"), overflow="fold", max_width=24)
    for column in columns:
        parts = [*column.names, column.amount]
        drawn.add_column(Text("\n".join(parts[num_shared:])), justify="right")
    for line in comparison.lines:
        if any(column in line.cells for column in columns) or line.backbone == "pretrained":
            drawn.add_row(Text(line.name), *(_cell(comparison, line, column) for column in columns))
    return drawn


def _cell(comparison: Comparison, line: Line, column: Column) -> Text:
    if column not in line.cells:
        return Text("")
    style = "bold" if comparison.is_best(line, column) else "not bold"
    return Text(report.shown(line.cells[column]), style=style, no_wrap=True)


def _curves(curves: dict[str, dict[str, Curve]]) -> Table:
    drawn = Table(title="training")
    for name in ("run", "metric", "over steps", "first", "last", "steps"):
        drawn.add_column(name, justify="right" if name in ("first", "last", "steps") else "left", overflow="fold")
    for metric in MAIN_METRICS:
        for name, curve in curves.get(metric, {}).items():
            values = [value for _, value in curve]
            ends = (f"{values[0]:.4g}", f"{values[-1]:.4g}", f"{curve[-1][0]:.0f}")
            drawn.add_row(Text(name), metric, bars(values), *ends)
    return drawn


def bars(values: Sequence[float], num: int = NUM_BARS) -> str:
    """A curve in one line of at most `num` blocks, each the mean of its share of the values."""
    num = min(num, len(values))
    ends = [round(len(values) * i / num) for i in range(num + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return "?" * num
    low, range_ = min(finite), (max(finite) - min(finite)) or 1.0
    heights = [(mean - low) / range_ * (len(BARS) - 1) if math.isfinite(mean) else None for mean in means]
    return "".join("?" if height is None else BARS[round(height)] for height in heights)
