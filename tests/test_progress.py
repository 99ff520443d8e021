"""What a run tells where there is no terminal: lines read from a metrics.jsonl that grows."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from rich.console import Console

from distssl import monitor, progress, report, sweep

TOTAL = 40


def append(run_dir: Path, step: int, **more: float) -> None:
    row = {"step": step, "loss": 5.0 - step / 10, "epoch": step / 10, "images_per_s": 1234.5, "total_steps": TOTAL}
    with open(run_dir / monitor.METRICS, "a") as file:
        file.write(json.dumps({**row, "eta_s": 3.0 * (TOTAL - step), **more}) + "\n")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Where the lines go; every step is worth one."""
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0)
    monkeypatch.setattr(progress, "POLL_S", 0.01)
    return io.StringIO()


def plain(told: io.StringIO) -> Console:
    return Console(file=told, force_terminal=False, width=200)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_lines_are_told_as_they_are_written(told: io.StringIO, tmp_path: Path) -> None:
    with progress.follow(tmp_path, plain(told)):
        append(tmp_path, 10)
        wait_for(lambda: "step 10/40" in told.getvalue())
        append(tmp_path, 20, knn=0.256)
        wait_for(lambda: "step 20/40" in told.getvalue())
    assert told.getvalue().splitlines() == [
        "step 10/40, epoch 1.0, loss 4.000, 1234 images/s, 1:30 left",
        "step 20/40, epoch 2.0, loss 3.000, 1234 images/s, kNN 25.6%, 1:00 left",
    ]


def test_a_resumed_run_tells_of_new_steps_alone(told: io.StringIO, tmp_path: Path) -> None:
    append(tmp_path, 10)
    with progress.follow(tmp_path, plain(told)):
        append(tmp_path, 20)
    assert [line.split(",")[0] for line in told.getvalue().splitlines()] == ["step 20/40"]


def test_a_line_is_told_when_it_is_whole_and_evaluations_are_none(told: io.StringIO, tmp_path: Path) -> None:
    with progress.follow(tmp_path, plain(told)):
        (tmp_path / monitor.METRICS).write_text('{"step": 10, "knn": 0.5}\n{"step": 11, "loss"')
        time.sleep(0.1)
        with open(tmp_path / monitor.METRICS, "a") as file:
            file.write(': 1.0, "epoch": 1.1, "images_per_s": 7.0, "total_steps": 40, "eta_s": 61.0}\n')
    assert told.getvalue() == "step 11/40, epoch 1.1, loss 1.000, 7 images/s, 1:01 left\n"


def test_steps_done_again_after_a_crash_are_told_again(told: io.StringIO, tmp_path: Path) -> None:
    with progress.follow(tmp_path, plain(told)):
        for step in (10, 20, 30):
            append(tmp_path, step)
        wait_for(lambda: "step 30/40" in told.getvalue())
        monitor.cut_back(tmp_path / monitor.METRICS, 10)
        time.sleep(0.1)
        append(tmp_path, 20)
    shown = [line.split(",")[0] for line in told.getvalue().splitlines()]
    assert shown == ["step 10/40", "step 20/40", "step 30/40", "step 20/40"]


def test_steps_done_again_between_two_looks_are_told_whole(
    told: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is longer than it was, and what was its end is in the middle of a line."""
    for step in (5, 10, 15):
        append(tmp_path, step)
    monkeypatch.setattr(progress, "POLL_S", 1000)  # it looks at the start and at the end
    with progress.follow(tmp_path, plain(told)):
        monitor.cut_back(tmp_path / monitor.METRICS, 5)
        for step in (10, 20, TOTAL):
            append(tmp_path, step, knn=0.123456)
    assert [line.split(",")[0] for line in told.getvalue().splitlines()] == ["step 10/40", "step 20/40", "step 40/40"]


def test_a_step_that_was_not_told_before_the_record_was_cut_after_it_is_told(tmp_path: Path) -> None:
    append(tmp_path, 10)
    with closing(progress._Tail(tmp_path / monitor.METRICS)) as tail:
        append(tmp_path, 20)
        monitor.cut_back(tmp_path / monitor.METRICS, 20)
        append(tmp_path, 30)
        assert [json.loads(line)["step"] for line in tail.lines()] == [20, 30]


def test_lines_between_are_spared_but_never_the_last(
    told: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 1000)
    with progress.follow(tmp_path, plain(told)):
        for step in range(1, TOTAL + 1):
            append(tmp_path, step)
    assert [line.split(",")[0] for line in told.getvalue().splitlines()] == ["step 1/40", "step 40/40"]


def test_a_terminal_gets_a_bar_to_the_last_step(told: io.StringIO, tmp_path: Path) -> None:
    terminal = Console(file=told, force_terminal=True, width=140)
    with progress.follow(tmp_path, terminal):
        append(tmp_path, 10)
        append(tmp_path, TOTAL)
    assert "40/40" in told.getvalue()
    assert "loss 1.000" in told.getvalue()


def test_the_end_of_a_run_that_never_logged_is_no_wait(told: io.StringIO, tmp_path: Path) -> None:
    started = time.monotonic()
    with progress.follow(tmp_path / "none", plain(told)):
        pass
    assert time.monotonic() - started < 5
    assert told.getvalue() == ""


def test_a_sweep_tells_how_far_it_is_and_the_best_so_far() -> None:
    space = {"eval.fit.lr": {"log_uniform": [0.001, 0.1]}}
    swept = sweep.Sweep(name="x", runs=("a",), task="finetune", num_trials=3, space=space)  # pyright: ignore[reportArgumentType]
    told = io.StringIO()
    tell = report.SweepProgress(swept, plain(told))
    for number, value, error in ((1, None, "its processes died"), (0, 0.25, None), (2, 0.5, None)):
        tell(sweep.Outcome(number, {"eval.fit.lr": 0.01}, value, 9, error=error))
    first, second, third = told.getvalue().splitlines()
    assert re.fullmatch(
        r"1/3  trial 1: failed: its processes died \(eval\.fit\.lr=0\.01\); about \d:\d\d:\d\d left", first
    )
    assert re.fullmatch(r"2/3  trial 0: 0\.2500 .*; best: trial 0, 0\.2500; about \d:\d\d:\d\d left", second)
    assert third == "3/3  trial 2: 0.5000 (eval.fit.lr=0.01); best: trial 2, 0.5000"
