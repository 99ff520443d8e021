"""What a run tells at its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distssl.downstream.evaluate import Row, read_summary


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


def _cell(row: Row) -> str:
    return f"{100 * row.value:.1f}" + (f" ±{100 * row.std:.1f}" if row.num_draws > 1 else "")
