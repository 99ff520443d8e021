"""Jobs as this process starts them: what is refused before anything is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distssl.errors import ConfigError
from distssl.on_ray import sweep
from distssl.sweep import Dimension, Sweep
from tests import runs
from tests.conftest import Said


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
