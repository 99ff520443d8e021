"""What a run tells at its end, and a sweep as it goes."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from distssl.downstream.rows import BACKBONES, LOWER_IS_BETTER, Row, read_summary, told_apart
from distssl.errors import RunError

if TYPE_CHECKING:
    from distssl.sweep import Outcome, Sweep
    from distssl.verify import Verdict


def show(run_dir: Path, console: Console, url: str | None = None) -> None:
    """Print the table of a run, where its folder is and how to open TensorBoard. url: where it is not `run_dir`."""
    rows = read_summary(run_dir)
    if rows:
        console.print(table(rows))
    tensorboard = Path(sys.executable).parent / "tensorboard"
    console.print(f"run folder:  {url or run_dir}", soft_wrap=True)
    logdir = url.rpartition("/")[0] if url else run_dir.parent
    console.print(f"TensorBoard: {tensorboard} --logdir {logdir}", soft_wrap=True)


def table(rows: Sequence[Row]) -> Table:
    """Backbones as columns, a line for each dataset, task, number of labels and metric; fits 80 columns."""
    rows = told_apart(rows)
    lines = list(dict.fromkeys((row.data, row.task, row.amount, row.metric) for row in rows))
    cells = {(row.backbone, row.data, row.task, row.amount, row.metric): shown(row) for row in rows}
    backbones = [name for name in BACKBONES if any(row.backbone == name for row in rows)]
    drawn = Table(title="mean over seeds ± half of its 95 % interval; shares in %")
    for name in ("data", "task", "labels", "metric"):
        drawn.add_column(name, justify="right" if name == "labels" else "left", overflow="fold")
    for name in backbones:
        drawn.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        drawn.add_row(*line, *(cells.get((name, *line), "") for name in backbones))
    return drawn


def outcome(done: Outcome) -> str:
    """A trial that has ended, in one line."""
    point = ", ".join(f"{key}={_value(value)}" for key, value in done.point.items())
    return f"trial {done.number}: {_came_of(done)} ({point})"


class SweepProgress:
    """Prints a line when a trial has ended: how many have, what came of it, the best so far and the time left."""

    def __init__(self, swept: Sweep, console: Console) -> None:
        self.swept, self.console = swept, console
        self.outcomes: list[Outcome] = []
        self._started = time.monotonic()

    def __call__(self, done: Outcome) -> None:
        from distssl import sweep

        self.outcomes.append(done)
        num, total = len(self.outcomes), self.swept.num_trials
        best = sweep.best(self.swept, self.outcomes)
        parts = [f"{num}/{total}  {outcome(done)}", f"best: trial {best.number}, {best.value:.4f}" if best else ""]
        if num < total:
            left_s = (time.monotonic() - self._started) / num * (total - num)
            parts.append(f"about {datetime.timedelta(seconds=round(left_s))} left")
        self.console.print("; ".join(filter(None, parts)), soft_wrap=True, markup=False)


def show_sweep(swept: Sweep, outcomes: Sequence[Outcome], console: Console) -> None:
    """Print the trials of a sweep, best first, and the command line that does the best one again."""
    from distssl import sweep

    drawn = Table(title=f"{swept.name}: {swept.metric} of {swept.task}")
    for name in ("trial", swept.metric, *swept.space):
        drawn.add_column(name, overflow="fold")
    for done in sweep.ranked(swept, outcomes):
        point = (_value(done.point.get(key, "")) for key in swept.space)
        drawn.add_row(str(done.number), _came_of(done), *point)
    console.print(drawn)
    found = sweep.best(swept, outcomes)
    if found is None:
        raise RunError(f"sweep {swept.name}: no trial ended well")
    console.print("the best again:")
    console.print(sweep.trial(swept, found.point).command(swept.task), soft_wrap=True, markup=False, highlight=False)


def _came_of(done: Outcome) -> str:
    if done.value is None:
        return f"failed: {done.error}"
    return f"{done.value:.4f}" + (f", stopped at step {done.step}" if done.stopped else "")


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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


def shown(row: Row) -> str:
    """A figure with its interval: shares in percent, others in their unit."""
    scale, digits = (1, 3) if row.metric in LOWER_IS_BETTER else (100, 1)
    interval = "" if row.interval is None else f" ±{scale * row.interval:.{digits}f}"
    return f"{scale * row.value:.{digits}f}{interval}"
