"""A comparison in the terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distssl import report
from distssl.compare import MAIN_METRICS, Column, Comparison, Curve, Line

BARS = "▁▂▃▄▅▆▇█"
NUM_BARS = 24


def show(comparison: Comparison, console: Console) -> None:
    """The table, in parts where it is too wide; label efficiency; training curves; where the pictures are."""
    for columns in _parts(comparison, console):
        console.print(_table(comparison, columns))
    if comparison.by_labels():
        console.print(_label_efficiency(comparison))
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


def _label_efficiency(comparison: Comparison) -> Table:
    """A line a backbone and figure, its bar over numbers of labels; within a figure all bars have one scale."""
    drawn = Table(title="over numbers of labels")
    for name in ("figure", "backbone", "labels", "", "fewest", "most"):
        drawn.add_column(name, justify="right" if name in ("fewest", "most") else "left", overflow="fold")
    for names, columns in comparison.by_labels():
        figure, amounts = " ".join(part for part in names if part), ", ".join(column.amount for column in columns)
        lines = [(line.name, [line.cells.get(column) for column in columns]) for line in comparison.lines]
        complete = [(name, [row for row in rows if row]) for name, rows in lines if all(rows)]
        drawn_bars = bars([row.value for _, rows in complete for row in rows], len(complete) * len(columns))
        for i, (name, rows) in enumerate(complete):
            part = drawn_bars[i * len(columns) : (i + 1) * len(columns)]
            drawn.add_row(Text(figure), Text(name), amounts, part, report.shown(rows[0]), report.shown(rows[-1]))
    return drawn


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
