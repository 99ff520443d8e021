"""The figures of an evaluation: rows of (data, backbone, task, number of labels, metric), and the file they lie in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from distssl import atomic

SUMMARY = "summary.json"
BACKBONES = ("random", "pretrained", "supervised")
METRICS = {
    "knn": ("accuracy",),
    "linear": ("accuracy", "macro_f1"),
    "finetune": ("accuracy", "macro_f1"),
    "retrieval": ("recall_at_1", "recall_at_5", "recall_at_10", "map"),
    "cluster": ("ari", "nmi", "accuracy"),
    "segment": ("miou", "pixel_accuracy", "f1"),
    "detect": ("ap", "ap50"),
    "depth": ("abs_rel", "rmse", "delta_1"),
    "keypoints": ("pck_0.05", "pck_0.1", "mean_error"),
}
LOWER_IS_BETTER = ("abs_rel", "rmse", "mean_error")  # of the metrics; these are no shares either


@dataclass(frozen=True)
class Row:
    """One figure of one backbone.

    backbone: one of BACKBONES. labels: how many were used, None for all; per_class: where these are as many of each
    class. values: one a seed, in the metric's unit. data: the labelled images, by their name; fingerprint: of those.
    """

    backbone: str
    task: str
    labels: int | None
    metric: str
    values: tuple[float, ...]
    data: str = ""
    per_class: int | None = None
    fingerprint: str = ""

    @property
    def amount(self) -> str:
        """How many labels, for people."""
        return "all" if self.labels is None else f"{self.per_class}/class" if self.per_class else str(self.labels)

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.values))

    @property
    def interval(self) -> float | None:
        """Half of the mean's 95 % interval over seeds, by Student's t; None for a single seed."""
        from scipy import special  # scipy.stats takes half a second to import

        if len(self.values) < 2:
            return None
        error = float(np.std(self.values, ddof=1)) / len(self.values) ** 0.5
        return float(special.stdtrit(len(self.values) - 1, 0.975)) * error

    @property
    def place(self) -> tuple[str | int | None, ...]:
        """What a newer row of the same place takes."""
        return self.data, self.fingerprint, self.backbone, self.task, self.labels, self.per_class, self.metric


def write_summary(run_dir: Path, rows: Sequence[Row]) -> list[Row]:
    """Add rows to summary.json in the run folder, each in the place of an older one of its kind; all rows there."""
    with atomic.locked(run_dir):
        merged = {row.place: row for row in [*read_summary(run_dir), *rows]}
        listed = [asdict(row) | {"value": row.value} for row in merged.values()]
        with atomic.replacing(run_dir / SUMMARY) as file:
            file.write_text(json.dumps({"rows": listed}, indent=1) + "\n")
    return list(merged.values())


def read_summary(run_dir: Path) -> list[Row]:
    """The rows of summary.json, [] where there is none."""
    path = run_dir / SUMMARY
    return [_row(fields) for fields in json.loads(path.read_text())["rows"]] if path.exists() else []


def _row(fields: dict[str, Any]) -> Row:
    own: dict[str, Any] = {key: value for key, value in fields.items() if key != "value"}
    return Row(**{**own, "values": tuple(own["values"])})


def told_apart(rows: Sequence[Row]) -> list[Row]:
    """The rows, with other names for data sets of one name: part of their fingerprints after it."""
    named = {(row.data, row.fingerprint) for row in rows if row.fingerprint}  # older files have none
    count = Counter(name for name, _ in named)
    return [
        replace(row, data=f"{row.data} {row.fingerprint[:6]}".strip()) if count[row.data] > 1 else row for row in rows
    ]
