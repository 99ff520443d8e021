"""Jobs as this process starts them: what is refused before anything is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distssl import config
from distssl.errors import ConfigError
from distssl.on_ray import sweep
from distssl.sweep import Dimension, Sweep
from tests import runs
from tests.conftest import Said

ROOT = Path(__file__).parent.parent.parent


def test_more_workers_than_gpus_are_refused(
    command: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    code, _, err = command(*runs.command_line(tmp_path, tmp_path / "runs"), "--workers=4")
    assert (code, err) == (
        2,
        ["error: machine.workers=4: this machine has 2 GPUs, one a worker; at most 2 is right"],
    )
    swept = Sweep(name="x", runs=("x",), parallel=3, space={"labels": Dimension(choice=[1])})
    with pytest.raises(ConfigError, match="parallel=3 trials of workers=1: this machine has 2 GPUs"):
        sweep.run(swept, lambda outcome: None)


@pytest.mark.parametrize("command", ["pretrain", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_under_torchrun_a_mistake_is_said_once_and_that_workers_are_ignored(tmp_path: Path, command: str) -> None:
    """Rank 0 meets it while the other waits; torchrun itself says more."""
    missing = tmp_path / "missing"
    arguments = runs.command_line(missing, tmp_path / "runs")
    if command == "evaluate":
        run = runs.trained(runs.tiny(runs.packed(tmp_path), tmp_path / "runs", "name=mine", "train.epochs=1"))
        (run.run_dir / "config.yaml").write_text(config.dump(run))
        arguments = ["evaluate", str(run.run_dir), "--task", "knn", "--workers=2", f"eval.test_source={missing}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    kept = ["--redirects=3", f"--log-dir={tmp_path / 'logs'}"]
    done = subprocess.run(
        [*torchrun, *kept, "launch.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    first, second = (path.read_text().splitlines() for path in sorted((tmp_path / "logs").rglob("stderr.log")))
    assert [line for line in first if "error" in line] == first[-1:], first
    assert f"={missing}: does not exist" in first[-1]
    assert not [line for line in first + second if "Traceback" in line]
    assert not [line for line in second if "error" in line], second
    assert done.returncode == 1
    assert "exitcode  : 2" in done.stderr
    assert sum("is ignored: torchrun says how many ranks there are" in line for line in first) == 1
    assert not [line for line in second if "is ignored" in line]
