"""Does every method learn? Each on the same photos, network, optimiser and steps, beside random and supervised ones.

Command: python benchmarks/learn.py            (--help for the rest; run again, it goes on and skips what it has)

The photos, backbone and probes are those of peer_simclr; the methods' options are recipes.py's. A finished method and
seed is a JSON file in benchmarks/rows; the table is made of those there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import photos
import provenance
import recipes
import study
from contestants import Settings

BASELINES = ("random", "supervised")
CHANCE = {"rotation": 1 / 4, "jigsaw": 1 / 100, "relative_position": 1 / 8, "corruption": 1 / 10}
COLLAPSED = 2.0  # an effective rank below it
COLUMNS = [("clothing", "20-NN", None), ("clothing", "linear", 100), ("clothing", "linear", 1000)]
COLUMNS += [("grocery", "linear", 1000), ("grocery", "linear", None)]


def render(found: Sequence[dict[str, Any]], settings: Settings) -> str:
    """Markdown."""
    titles = [f"{data} {task} {labels or 'all'}" for data, task, labels in COLUMNS]
    lines = [
        provenance.describe(),
        f"- machines of the rows: {'; '.join(sorted({row['machine'] for row in found}))}",
        f"- settings: {settings}; photos of {photos.SIZE_PX} px",
        "",
        "| method | n | pretext accuracy (chance) | " + " | ".join(titles) + " | effective rank | images/s |",
        "|---|" + "---|" * (len(titles) + 4),
    ]
    for name in (*BASELINES, *recipes.OPTIONS):
        mine = [row for row in found if row["contestant"] == name]
        if mine:
            lines.append(_line(name, mine))
    return "\n".join(lines) + "\n"


def _line(name: str, mine: Sequence[dict[str, Any]]) -> str:
    accuracy = _percent([row["accuracy"] for row in mine if name in CHANCE])
    ranks = [row["effective_rank"] for row in mine if "effective_rank" in row]
    columns = [
        name + (" **collapsed**" if ranks and np.mean(ranks) < COLLAPSED else ""),
        str(len({row["seed"] for row in mine})),
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
    return f"{mean:.1f}" + (f" ± {max(abs(100 * value - mean) for value in values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    study.main(__doc__, (*BASELINES, *recipes.OPTIONS), 2, render)
