"""A comparison as one HTML file that needs no other: table, settings, charts, pictures. It has no script."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import itertools
import platform
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path

from PIL import Image

from distssl import atomic, compare, report, svg
from distssl.compare import Column, Comparison, Line
from distssl.downstream.rows import LOWER_IS_BETTER
from distssl.svg import Point, Series

VERSIONS = ("distssl", "torch", "torchvision", "tensorboard")
WIDEST_PX, MOST_BYTES = 900, 300_000  # a larger picture is made smaller

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d1f21; --soft: #62676c; --rule: #d5d8da; --band: #f4f5f6;
  --c0: #0072b2; --c1: #d55e00; --c2: #00845f; --c3: #b3538c; --c4: #a87400; --c5: #3d8fc4;
  --random: #8a9096; --supervised: #1d1f21; }
@media (prefers-color-scheme: dark) { :root { --back: #17191b; --text: #e4e6e8; --soft: #9aa0a6; --rule: #3b4045;
  --band: #212427; --c0: #4fa8e0; --c1: #f0803c; --c2: #35bf95; --c3: #df93bf; --c4: #e6ad33; --c5: #8cc8f0;
  --random: #8a9096; --supervised: #e4e6e8; } }
body { font: 15px/1.5 system-ui, "Liberation Sans", sans-serif; color: var(--text); background: var(--back);
  max-width: 1180px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; } p { margin: .3rem 0 .6rem; max-width: 75ch; }
.soft { color: var(--soft); } code { font: .88em "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap;
  font-weight: normal; }
thead th { color: var(--soft); font-size: .87rem; } thead th[colspan] { text-align: center; }
th.first, tbody th { text-align: left; position: sticky; left: 0; background: var(--back); }
.starts { border-left: 1px solid var(--rule); } td.best { font-weight: 700; background: var(--band); }
tr.pretrained + tr.baseline > * { border-top: 1px solid var(--rule); }
tr.baseline th { color: var(--soft); } .spread { color: var(--soft); font-weight: normal; font-size: .87em; }
table.settings th { text-align: left; }
table.settings td { white-space: normal; overflow-wrap: anywhere; text-align: left; max-width: 24rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.2rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .9rem; margin-bottom: .3rem; }
figure img { width: 100%; background: #fff; } svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--soft); } svg .mid { text-anchor: middle; } svg .end { text-anchor: end; }
svg g text { fill: var(--text); } .grid { stroke: var(--rule); stroke-width: .7; fill: none; }
.axis { stroke: var(--soft); fill: none; } .line { stroke: var(--c); fill: none; stroke-width: 1.8; }
.mark { fill: var(--c); } summary { cursor: pointer; margin: .8rem 0; }
"""


def write(comparison: Comparison, path: Path, command: str) -> None:
    """Write the report. command: what the user said to get it."""
    names = ", ".join(member.name for member in comparison.members)
    sections = [
        f"<h1>{escape(names)}</h1>",
        f'<p class="soft">{len(comparison.members)} {"run" if len(comparison.members) == 1 else "runs"} compared</p>',
        *_table(comparison),
        *_settings(comparison),
        *_label_charts(comparison),
        *_training_charts(comparison),
        *_pictures(comparison),
        *_origin(comparison, command),
    ]
    with atomic.replacing(path) as file:
        file.write_text(document(names, sections), encoding="utf-8")


def document(title: str, sections: Sequence[str]) -> str:
    """A page of sections of HTML, with the styles of tables and charts."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>'
        f"{escape(title)}: distssl</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _table(comparison: Comparison) -> list[str]:
    columns = comparison.columns
    starts = [i for i, column in enumerate(columns) if i == 0 or column.names != columns[i - 1].names]
    reading = (
        "Mean over seeds ± half of its 95 % interval, the best of a column in bold. Shares are in %; of "
        f"{', '.join(LOWER_IS_BETTER)} the lowest is the best. An empty cell was not evaluated."
    )
    parts = ["<h2>Figures</h2>", f'<p class="soft" id="reading">{escape(reading)}</p>']
    parts.append('<div class="wide" tabindex="0"><table id="figures" aria-describedby="reading"><thead>')
    for depth, title in enumerate(("data", "task", "metric")):
        cells = [f'<th class="first" scope="row">{title}</th>']
        for key, group in itertools.groupby(columns, key=lambda column: column.names[: depth + 1]):
            span = len(list(group))
            cells.append(f'<th class="starts" scope="colgroup" colspan="{span}">{escape(key[-1])}</th>')
        parts.append(f"<tr>{''.join(cells)}</tr>")
    amounts = [_th(column.amount, "starts" if i in starts else "") for i, column in enumerate(columns)]
    parts.append(f'<tr><th class="first" scope="row">labels</th>{"".join(amounts)}</tr></thead><tbody>')
    for line in comparison.lines:
        cells = [_cell(comparison, line, column, i in starts) for i, column in enumerate(columns)]
        kind = "pretrained" if line.backbone == "pretrained" else "baseline"
        head = f'<th scope="row" title="{escape(", ".join(line.runs))}">{escape(line.name)}</th>'
        parts.append(f'<tr class="{kind}">{head}{"".join(cells)}</tr>')
    return ["\n".join([*parts, "</tbody></table></div>"])]


def _th(text: str, kind: str) -> str:
    return f'<th class="{kind}" scope="col">{escape(text)}</th>'


def _cell(comparison: Comparison, line: Line, column: Column, starts: bool) -> str:
    kinds = ["starts"] if starts else []
    if column not in line.cells:
        return f'<td class="{" ".join(kinds)}"></td>'
    row = line.cells[column]
    if comparison.is_best(line, column):
        kinds.append("best")
    data = {
        "run": line.name,
        "backbone": line.backbone,
        "data": column.data,
        "task": column.task,
        "labels": column.amount,
        "metric": column.metric,
        "value": repr(row.value),
        "interval": "" if row.interval is None else repr(row.interval),
    }
    attributes = " ".join(f'data-{name}="{escape(value)}"' for name, value in data.items())
    figure, sign, spread = report.shown(row).partition(" ±")
    spread = f' <span class="spread">±{spread}</span>' if sign else ""
    return f'<td class="{" ".join(kinds)}" {attributes}>{figure}{spread}</td>'


def _settings(comparison: Comparison) -> list[str]:
    heads = "".join(_th(member.name, "") for member in comparison.members)
    parts = ["<h2>What differs in the settings</h2>", '<div class="wide"><table class="settings">']
    parts.append(f'<thead><tr><th class="first" scope="col">key</th>{heads}</tr></thead><tbody>')
    for key, values in comparison.settings.items():
        cells = "".join(f"<td>{escape(compare.setting(value))}</td>" for value in values)
        parts.append(f'<tr><th scope="row"><code>{escape(key)}</code></th>{cells}</tr>')
    return [*parts, "</tbody></table></div>"]


def _label_charts(comparison: Comparison) -> list[str]:
    """One for each data, task and metric that was evaluated at several numbers of labels."""
    charts = []
    for (data, task, metric), columns in comparison.by_labels():
        scale = 1 if metric in LOWER_IS_BETTER else 100
        series = [
            Series(line.name, _points(line, columns, scale), *_look(comparison, line))
            for line in comparison.lines
            if any(column in line.cells for column in columns)
        ]
        title = f"{data} {task}: {metric} against labels"
        unit = "" if scale == 1 else ", %"
        drawn = svg.chart(title, "labels (log scale)", f"{metric}{unit}", series, log_x=True)
        charts.append(_figure(f"{data} {task}".strip(), drawn))
    note = "Bars are 95 % intervals over seeds. “all” stands past the scale."
    return ["<h2>Label efficiency</h2>", f'<p class="soft">{note}</p>', _cards(charts)] if charts else []


def _points(line: Line, columns: Iterable[Column], scale: float) -> list[Point]:
    points = []
    for column in columns:
        if column in line.cells:
            row = line.cells[column]
            x = float("inf") if column.labels is None else float(column.labels)
            points.append(Point(x, scale * row.value, None if row.interval is None else scale * row.interval))
    return points


def _look(comparison: Comparison, line: Line) -> tuple[str, int, bool]:
    """Colour, number and whether dashed."""
    alike = [other for other in comparison.lines if other.backbone == line.backbone]
    number = next(i for i, other in enumerate(alike) if other is line)
    if line.backbone == "pretrained":
        return f"c{number % svg.NUM_COLOURS}", number, number >= svg.NUM_COLOURS
    return line.backbone, number, True


def _training_charts(comparison: Comparison) -> list[str]:
    looks = {line.name: _look(comparison, line) for line in comparison.lines if line.backbone == "pretrained"}
    charts: dict[bool, list[str]] = {True: [], False: []}
    for metric, curves in comparison.curves().items():
        scale, unit = (100, "accuracy, %") if metric == "knn" else (1, metric)
        series = [
            Series(name, [Point(step, scale * value) for step, value in curve], *looks[name])
            for name, curve in curves.items()
        ]
        drawn = svg.chart(f"{metric} in training", "optimiser steps", unit, series)
        charts[metric in compare.MAIN_METRICS].append(_figure(metric, drawn))
    if not charts[True] and not charts[False]:
        return []
    more = f"<details><summary>{len(charts[False])} more</summary>{_cards(charts[False])}</details>"
    note = "Losses of different methods are different quantities."
    return ["<h2>Training</h2>", f'<p class="soft">{note}</p>', _cards(charts[True]), more if charts[False] else ""]


def _pictures(comparison: Comparison) -> list[str]:
    """Those of one name beside each other."""
    names = sorted({path.stem for member in comparison.members for path in member.pictures})
    parts = []
    for name in names:
        cards = [
            _figure(member.name, f'<img src="{_data_uri(path)}" alt="{escape(f"{name} of {member.name}")}">')
            for member in comparison.members
            for path in member.pictures
            if path.stem == name
        ]
        parts += [f"<h3>{escape(name.replace('_', ' '))}</h3>", _cards(cards)]
    note = (
        "Neighbours: a test image, then its nearest training images; a green edge is of the same class. Clusters: a "
        "row each, the largest first; a green edge is of the cluster's most frequent class."
    )
    return ["<h2>Pictures</h2>", f'<p class="soft">{note}</p>', *parts] if parts else []


def _data_uri(path: Path) -> str:
    data, kind = path.read_bytes(), "png"
    if len(data) > MOST_BYTES:
        with Image.open(path) as image:
            image.thumbnail((WIDEST_PX, 10 * WIDEST_PX))
            smaller = io.BytesIO()
            image.convert("RGB").save(smaller, "JPEG", quality=88)
        data, kind = smaller.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _origin(comparison: Comparison, command: str) -> list[str]:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in VERSIONS]
    made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    folders = "".join(f"<li><code>{escape(str(member.folder))}</code></li>" for member in comparison.members)
    return [
        "<h2>How this was made</h2>",
        f"<p><code>{escape(command)}</code></p>",
        f'<p class="soft">{made}; {", ".join(versions)}, Python {platform.python_version()}</p>',
        f"<ul>{folders}</ul>",
    ]


def _figure(title: str, content: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{content}</figure>"


def _cards(figures: Iterable[str]) -> str:
    return f'<div class="cards">{"".join(figures)}</div>'
