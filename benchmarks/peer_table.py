"""The tables of peer_simclr from the rows on disk: accuracy, and what the training cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import photos
import provenance
from contestants import Settings

NAMES = {
    "random": "random initialisation",
    "simclr": "SimCLR, distssl",
    "lightly": "SimCLR, lightly",
    "supervised": "supervised from scratch",
}
NOTE = """\
Accuracy in %, mean over seeds ± half the 95 % interval of the mean (Student's t over seeds; the test sets of 904 and
2,485 images alone leave about 3 and 2 points, the same images for all). Linear figures are means over {draws} label
subsets a seed, the same for all backbones; a supervised network stands in the column of the labels it had, one subset
a seed. Pretraining saw the photos of the clothing test senders, without labels, and none of grocery's test.
"""
Key = tuple[str, str, int | None]  # data, task, labels


def render(found: Sequence[dict[str, Any]], settings: Settings) -> str:
    """Markdown."""
    values = _values(found)
    parts = [
        provenance.describe(),
        f"- settings: {settings}",
        "",
        NOTE.format(draws=photos.NUM_DRAWS),
        *_accuracy(values, [key for key in _columns() if key[0] == "clothing"]),
        "",
        *_accuracy(values, [key for key in _columns() if key[0] == "grocery"]),
        "",
        *_cost(found, settings),
    ]
    return "\n".join(parts) + "\n"


def _columns() -> list[Key]:
    keys: list[Key] = []
    for name, nums in photos.LABELS.items():
        keys += [(name, f"{k}-NN", None) for k in (1, 20)]
        keys += [(name, "linear", num) for num in nums]
    return keys


def _values(found: Sequence[dict[str, Any]]) -> dict[tuple[str, Key], dict[int, float]]:
    """(contestant, column) -> {seed: accuracy}; a supervised network stands in the linear columns."""
    values: dict[tuple[str, Key], dict[int, float]] = {}
    for cell in found:
        for row in cell["rows"]:
            key = (cell["contestant"], (row["data"], row["task"], row["labels"]))
            values.setdefault(key, {})[cell["seed"]] = row["value"]
    return values


def _accuracy(values: dict[tuple[str, Key], dict[int, float]], columns: Sequence[Key]) -> list[str]:
    titles = [f"{task}, {labels or 'all'}" for _, task, labels in columns]
    lines = [_row(columns[0][0], *titles), _row(*["---"] * (len(columns) + 1))]
    for method, name in NAMES.items():
        found = [values.get((method, key), {}) for key in columns]
        if any(found):
            lines.append(_row(name, *(_percent(list(cell.values())) for cell in found)))
    differences = [_paired(values.get(("simclr", key), {}), values.get(("lightly", key), {})) for key in columns]
    if any(differences):
        lines.append(_row("distssl - lightly, by seed", *(_percent(pairs) for pairs in differences)))
    return lines


def _paired(a: dict[int, float], b: dict[int, float]) -> list[float]:
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def _cost(found: Sequence[dict[str, Any]], settings: Settings) -> list[str]:
    """Wall-clock and CPU time of the trainings that were not interrupted."""
    trained = {(cell["contestant"], cell["seed"]): cell for cell in found if cell.get("wall_s") and cell["steps"]}
    lines = [
        _row("training", "n", "steps", "wall, s", "CPU, s", "images/s", "images/CPU-s"),
        _row(*["---"] * 7),
    ]
    for method in ("simclr", "lightly"):
        mine = [cell for (name, _), cell in trained.items() if name == method]
        if mine:
            images = mine[0]["steps"] * settings.batch
            walls, cpus = [cell["wall_s"] for cell in mine], [cell["cpu_s"] for cell in mine]
            rates = [f"{images / float(np.mean(times)):.0f}" for times in (walls, cpus)]
            lines.append(_row(NAMES[method], len(mine), mine[0]["steps"], _spread(walls), _spread(cpus), *rates))
    pairs = [(trained["simclr", seed], trained["lightly", seed]) for (name, seed) in trained if name == "simclr"
             and ("lightly", seed) in trained]  # fmt: skip
    if pairs:
        ratios = {key: [ours[key] / theirs[key] for ours, theirs in pairs] for key in ("wall_s", "cpu_s")}
        spreads = [_spread(values, digits=3) for values in ratios.values()]
        lines.append(_row("distssl / lightly, by seed", len(pairs), "", *spreads, "", ""))
    return lines


def _spread(values: Sequence[float], digits: int = 0) -> str:
    return f"{np.mean(values):.{digits}f}" + (f" ± {provenance.interval(values):.{digits}f}" if len(values) > 1 else "")


def _percent(values: Sequence[float]) -> str:
    return _spread([100 * value for value in values], digits=1) if len(values) else ""


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
