"""What a run tells at its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from distssl.downstream.evaluate import Row, read_summary

if TYPE_CHECKING:
    from distssl.verify import Verdict


def show(run_dir: Path, console: Console) -> None:
    """Print the table of a run, where its folder is and how to open TensorBoard."""
    rows = read_summary(run_dir)
    if rows:
        console.print(table(rows))
    tensorboard = Path(sys.executable).parent / "tensorboard"
    console.print(f"run folder:  {run_dir}", soft_wrap=True)
    console.print(f"TensorBoard: {tensorboard} --logdir {run_dir.parent}", soft_wrap=True)


def table(rows: Sequence[Row]) -> Table:
    """Backbones as rows, task and number of labels as columns; fits 80 columns."""
    columns = list(dict.fromkeys((row.task, row.labels) for row in rows))
    cells = {(row.backbone, row.task, row.labels): _cell(row) for row in rows}
    drawn = Table(title="accuracy in %, by task and number of labels")
    drawn.add_column("backbone", no_wrap=True)
    for task, labels in columns:
        drawn.add_column(f"{task}\n{labels or 'all'}", justify="right", no_wrap=True)
    for backbone in dict.fromkeys(row.backbone for row in rows):
        drawn.add_row(backbone, *(cells.get((backbone, *column), "") for column in columns))
    return drawn


def show_verdicts(verdicts: Sequence[Verdict], console: Console) -> None:
    """Print the certificate: a row for each method, number of batches a step and number of workers."""
    drawn = Table(title="against one process with the whole batch: relative errors")
    for name in ("method", "batches\na step", "W", "views", "loss", "gradient", "state", ""):
        drawn.add_column(name, justify="left" if name in ("method", "") else "right")
    for verdict in verdicts:
        drawn.add_row(
            verdict.case.method,
            str(verdict.case.accumulate),
            str(verdict.world_size),
            f"{verdict.views_differ} differ" if verdict.views_differ else "equal",
            *(f"{error:.0e}" for error in (verdict.loss_error, verdict.gradient_error, verdict.state_error)),
            "holds" if verdict.holds else "FAILS",
        )
    console.print(drawn)
    for verdict in verdicts:
        if not verdict.holds:
            place = f"{verdict.case.method} at {verdict.world_size} workers, {verdict.case.accumulate} batches a step"
            console.print(f"{place}: worst of its state is {verdict.worst}", soft_wrap=True)


def _cell(row: Row) -> str:
    return f"{100 * row.value:.1f}" + (f" ±{100 * row.std:.1f}" if row.num_draws > 1 else "")
