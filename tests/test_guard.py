"""What a person would notice after a week is said at once, and runs as they should be are left alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from distssl import checkpoint
from distssl.config import Run
from distssl.context import Context
from distssl.data import shards
from distssl.data.shards import Dataset
from distssl.errors import RunError
from distssl.guard import Guard
from distssl.train import Training
from tests import runs

HEALTHY = {"gradient_norm": 1.0, "embedding_std": 0.5, "effective_rank": 9.0}
COLLAPSED = {"gradient_norm": 1.0, "embedding_std": 0.01, "effective_rank": 9.0}
ONE_DIMENSION = {"gradient_norm": 1.0, "embedding_std": 0.9, "effective_rank": 1.5}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("guarded"))


def watch(guard: Guard, lines: list[dict[str, float]], caplog: pytest.LogCaptureFixture) -> list[int]:
    """The numbers of the lines, from 1, at which it warned."""
    said = []
    for number, figures in enumerate(lines, 1):
        caplog.clear()
        guard.look(number, figures)
        said += [number] * len(caplog.records)
    return said


@pytest.mark.parametrize("collapsed", [COLLAPSED, ONE_DIMENSION])
def test_collapse_is_said_once_when_three_lines_agree(
    collapsed: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    lines = [HEALTHY, collapsed, collapsed, HEALTHY, *[collapsed] * 5, HEALTHY, *[collapsed] * 3]
    assert watch(Guard("warn", 0, tells=True), lines, caplog) == [7, 13]
    assert watch(Guard("warn", 0, tells=False), lines, caplog) == []
    guard = Guard("stop", 0, tells=False)
    watch(guard, lines[:6], caplog)
    with pytest.raises(RunError, match=r"collapsed at step 7.*train\.on_collapse=warn"):
        guard.look(7, collapsed)


def test_lines_of_the_warm_up_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    assert watch(Guard("warn", 5, tells=True), [COLLAPSED] * 9, caplog) == [8]


def test_a_gradient_is_compared_with_the_median_of_the_lines_before(caplog: pytest.LogCaptureFixture) -> None:
    norms = [3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 40.0, 20.0, 21.0, 2.0]  # the tenth has too few before it
    lines = [HEALTHY | {"gradient_norm": norm} for norm in norms]
    assert watch(Guard("warn", 0, tells=True), lines, caplog) == [12]


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_no_number_is_refused(name: str, value: float) -> None:
    guard = Guard("warn", 0, tells=True)
    figures = {"loss": 1.0, "gradient_norm": 1.0}
    guard.require_numbers(3, figures)
    with pytest.raises(RunError, match=r"at step 3; try a lower train\.lr"):
        guard.require_numbers(3, figures | {name: value})


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_parameter_that_is_no_number_is_refused(value: float) -> None:
    guard, net = Guard("warn", 0, tells=True), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    guard.require_finite(5, net)
    with torch.no_grad():
        list(net.parameters())[2][1, 2] = value
    with pytest.raises(RunError, match="after step 5"):
        guard.require_finite(5, net)


def trained(run: Run) -> None:
    with Context(run.run_dir) as context:
        Training(run, context, Dataset.open(run.data.source)).run()


def black(folder: Path, num: int) -> Path:
    """A folder of images from a camera whose lens cap is on: what a backbone makes of one it makes of all."""
    folder.mkdir()
    for i in range(num):
        Image.new("RGB", (48, 48)).save(folder / f"{i:03d}.png")
    return folder


def test_a_run_that_collapses_says_so_or_stops(packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> list[str]:
        return [record.message for record in caplog.records if "the embeddings have collapsed" in record.message]

    trained(runs.tiny(packed, tmp_path, "train.epochs=2"))
    assert said() == []
    caps = shards.pack(str(black(tmp_path / "black", 64)), tmp_path / "packed")
    trained(runs.tiny(caps, tmp_path, "name=warned", "train.epochs=3"))
    assert len(said()) == 1
    assert "at step 7: embedding_std 0" in said()[0]  # four steps of warm-up, then three lines
    with pytest.raises(RunError, match="the embeddings have collapsed at step 7"):
        trained(runs.tiny(caps, tmp_path, "name=stopped", "train.epochs=3", "train.on_collapse=stop"))


def test_no_checkpoint_has_parameters_that_are_no_numbers(packed: Path, tmp_path: Path) -> None:
    """The log looks every thousand steps, so the checkpoint has to."""
    run = runs.tiny(packed, tmp_path, "train.lr=1e30", "train.warmup_epochs=0", "train.log_every=1000",
                    "train.epochs=2", "checkpoint.every=2")  # fmt: skip
    with pytest.raises(RunError, match="a parameter is no number after step 2"):
        trained(run)
    assert not list(checkpoint.folder(run.run_dir).glob("step_*"))
