"""The figures of an evaluation: rows of (data, backbone, task, number of labels, metric), and the file they lie in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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

    backbone: one of BACKBONES. labels: how many were used, None for all. values: one a seed, in the metric's unit.
    data: the labelled images, by their name.
    """

    backbone: str
    task: str
    labels: int | None
    metric: str
    values: tuple[float, ...]
    data: str = ""

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.values))

    @property
    def interval(self) -> float | None:
        """Half of the mean's 95 % interval over seeds, by Student's t; None for a single seed."""
        from scipy import stats

        if len(self.values) < 2:
            return None
        error = float(np.std(self.values, ddof=1)) / len(self.values) ** 0.5
        return float(stats.t.ppf(0.975, len(self.values) - 1)) * error

    @property
    def place(self) -> tuple[str, str, str, int | None, str]:
        """What a newer row of the same place takes."""
        return self.data, self.backbone, self.task, self.labels, self.metric


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
    values = tuple(fields["values"])
    return Row(fields["backbone"], fields["task"], fields["labels"], fields["metric"], values, fields["data"])
