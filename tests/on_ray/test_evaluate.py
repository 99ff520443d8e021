"""`evaluate` by Ray's workers on this machine: the figures of one process, and mistakes in one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from distssl.downstream.rows import read_summary
from tests import runs
from tests.conftest import Said

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    settings = ["train.epochs=1", "train.precision=float64", "eval.fit.steps=4", "eval.fit.batch=8", "eval.num_seeds=1"]
    run = runs.trained(runs.tiny(runs.packed(folder), folder, "name=base", *settings))
    (run.run_dir / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return run.run_dir


def evaluate(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """By a user who is in the folder above the run's."""
    command = [sys.executable, str(ROOT / "launch.py"), "evaluate", str(run), *arguments]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=run.parent, capture_output=True, text=True, env=environ, timeout=300, check=False
    )


def test_the_figures_of_two_workers_are_those_of_one_process(
    pretrained: Path, tmp_path: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The labelled images' path counts from the user's folder."""
    runs.photos(tmp_path / "labelled", num=80, seed=1)
    what = ["--task", "knn,cluster,finetune", "eval.source=labelled"]
    by_one, by_two = (shutil.copytree(pretrained, tmp_path / name) for name in ("by_one", "by_two"))
    monkeypatch.chdir(tmp_path)
    code, out, err = command("evaluate", by_one, *what)
    assert code == 0, err
    assert "Ray" not in out
    done = evaluate(by_two, *what, "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "2 Ray workers" in done.stdout
    assert "Ray's dashboard: http://127.0.0.1:" in done.stderr
    figures = sorted(read_summary(by_one), key=str)
    assert {row.task for row in figures} == {"knn", "cluster", "finetune"}
    assert sorted(read_summary(by_two), key=str) == figures


@pytest.mark.slow  # as the one of test_pretrain.py
def test_a_mistake_that_workers_find_is_one_line(pretrained: Path) -> None:
    done = evaluate(pretrained, "--task", "segment", "--workers", "2")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "has no labels; say eval.source=LABELLED_IMAGES" in done.stderr
    lines = done.stderr.splitlines()
    assert not [line for line in lines if "Traceback" in line and "TrainController" not in line]  # which is Ray's own
