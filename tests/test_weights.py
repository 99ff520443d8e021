"""Runs that start from another's backbone: what they begin with, that they resume without it, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distssl import checkpoint, config, job, run_folder, weights
from distssl.config import Run
from distssl.context import Context
from tests import runs
from tests.conftest import Ranks, Said

Command = Callable[..., Said]
State = dict[str, Tensor]

PRECISE = [
    "train.precision=float64",
    "train.epochs=1",
    "eval.tasks=[]",
    "checkpoint.every=1",
    "checkpoint.keep_last=99",
]
STILL = ["train.lr=1e-12", "train.weight_decay=0"]  # what a run began with can be read off its end


def settings(source: Path, storage: Path, *overrides: str) -> list[str]:
    """The command line of a tiny run."""
    return runs.command_line(source, storage, *PRECISE, *overrides)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"), num=64)


@pytest.fixture(scope="module")
def first(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of SimCLR."""
    run = runs.tiny(packed, tmp_path_factory.mktemp("first"), *PRECISE, "name=first", "train.precision=float32")
    pretrain(run, job.prepare(run, 1))
    return run.run_dir


def pretrain(run: Run, folders: job.Folders) -> None:
    with Context(run.run_dir) as context:
        assert job.pretrain(run, context, folders)


def state_of(run_dir: Path) -> dict[str, Any]:
    state = checkpoint.newest(run_dir)
    assert state is not None
    return state


def of_backbone(run_dir: Path, prefix: str = "backbone.") -> State:
    """Parameters of the backbone at the end of a run; running statistics move even where nothing learns."""
    model = state_of(run_dir)["model"]
    found = {name.removeprefix(prefix): x for name, x in model.items() if name.startswith(prefix)}
    return {name: x.double() for name, x in found.items() if "running" not in name and x.is_floating_point()}


def check_equal(found: State, expected: State, tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name] - x).abs().max() <= tolerance, name


@pytest.mark.parametrize(
    ("method", "prefixes"),
    [
        ("uda", ["backbone."]),
        ("byol", ["backbone.", "teacher.net.0."]),
        ("rotation", ["backbone."]),
    ],
)
def test_backbone_and_teacher_begin_with_the_weights_of_another_run(
    command: Command, packed: Path, first: Path, tmp_path: Path, method: str, prefixes: list[str]
) -> None:
    code, _, err = command(
        *settings(packed, tmp_path, f"method.name={method}", *STILL, f"model.init={first}", "name=a")
    )
    assert code == 0, err
    for prefix in prefixes:
        check_equal(of_backbone(tmp_path / "a", prefix), of_backbone(first))


def test_an_exported_file_is_as_good_as_its_run(command: Command, packed: Path, first: Path, tmp_path: Path) -> None:
    code, out, err = command("export", first, "--format", "safetensors", "--out", tmp_path)
    assert code == 0, err
    file = out.partition(":")[0]
    uda = ["method.name=uda", "train.lr=0.01"]
    for name, init in (("run", first), ("file", file), ("random", "null")):
        code, _, err = command(*settings(packed, tmp_path, *uda, f"model.init={init}", f"name={name}"))
        assert code == 0, err
    check_equal(of_backbone(tmp_path / "file"), of_backbone(tmp_path / "run"), 0)
    assert (of_backbone(tmp_path / "random")["net.conv1.weight"] - of_backbone(first)["net.conv1.weight"]).norm() > 1
    digests = {
        config.parse((tmp_path / name / run_folder.CONFIG).read_text(), name).model.init_sha256
        for name in ("run", "file")
    }
    assert digests == {run_folder.weights_at(str(first)).sha256}


def back_to(run_dir: Path, step: int) -> None:
    """As if the run had been killed after a step."""
    for path in checkpoint.folder(run_dir).glob("step_*"):
        if checkpoint.step_of(path.name) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("step", [0, 2])
def test_a_killed_run_needs_the_other_no_more(
    command: Command, packed: Path, first: Path, tmp_path: Path, step: int
) -> None:
    """Before its first checkpoint it begins again with its copy, after that it does without."""
    other = shutil.copytree(first, tmp_path / "other")
    line = settings(packed, tmp_path, "method.name=uda", f"model.init={other}", "name=a")
    assert command(*line)[0] == 0
    whole = state_of(tmp_path / "a")
    shutil.rmtree(other)
    if step:
        (tmp_path / "a" / weights.KEPT).unlink()
    back_to(tmp_path / "a", step)
    code, _, err = command(*line)
    assert code == 0, err
    again = state_of(tmp_path / "a")
    assert again["step"] == whole["step"] > 2
    for name, value in whole["model"].items():
        torch.testing.assert_close(again["model"][name], value, rtol=1e-12, atol=1e-14)


def test_other_weights_in_the_same_place_are_another_run(
    command: Command, packed: Path, first: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(first, tmp_path / "other")
    line = settings(packed, tmp_path, "method.name=uda", "name=a")
    assert command(*line, f"model.init={other}")[0] == 0
    moved = other.rename(tmp_path / "moved")
    code, _, err = command(*line, f"model.init={moved}")
    assert code == 0, err
    back_to(shutil.copytree(moved, other), 2)
    before = (tmp_path / "a" / run_folder.CONFIG).read_bytes()
    code, _, err = command(*line, f"model.init={other}")
    assert (code, len(err)) == (2, 2)
    ours, theirs = (run_folder.weights_at(str(place)).sha256 for place in (moved, other))
    assert f"a holds another run: model.init_sha256: '{ours}' there, '{theirs}' here" in err[0]
    assert (tmp_path / "a" / run_folder.CONFIG).read_bytes() == before
    copy = tmp_path / "a" / weights.KEPT
    assert command(*line, f"model.init={copy}")[0] == 0
    copy.write_bytes((other / "config.yaml").read_bytes())
    code, _, err = command(*line, f"model.init={copy}", "name=b")
    assert (code, len(err)) == (2, 1)
    assert f"model.init: {copy}: not a backbone; a file of `export --format safetensors` is right" in err[0]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.init=nowhere"], "model.init: nowhere: not there; a run folder or a file of `export"),
        (["model.init={empty}"], "no run there; a run folder with config.yaml is right"),
        (["model.init={bare}"], "no checkpoint yet"),
        (
            ["model.backbone=resnet18"],
            "its network has model.backbone=resnet10, this run's resnet18; the same is right",
        ),
        (["model.stem=3x3_s1"], "its network has model.stem=3x3_s2, this run's 3x3_s1"),
        (
            ["model.options={{width: 16}}"],
            "net.conv1.weight is [8, 3, 3, 3], in this run [16, 3, 3, 3]; a network as that of model.options={",
        ),
        ([f"model.init_sha256={'ab' * 32}"], "the weights at model.init="),
        ([f"model.init_sha256={'ab' * 32}", "model.init=null"], "says which weights model.init must have"),
        (["model.init_sha256=abc"], "model.init_sha256='abc'"),
    ],
)
def test_weights_that_do_not_fit_are_told_before_anything_is_written(
    command: Command, packed: Path, first: Path, tmp_path: Path, overrides: list[str], told: str
) -> None:
    places = {"empty": tmp_path / "empty", "bare": tmp_path / "bare"}
    places["empty"].mkdir()
    shutil.copytree(first, places["bare"], ignore=shutil.ignore_patterns("checkpoints"))
    filled = [override.format(**places) for override in overrides]
    code, _, err = command(*settings(packed, tmp_path / "new", f"model.init={first}", "method.name=uda", *filled))
    assert (code, len(err)) == (2, 1), err
    assert told in err[0]
    assert not (tmp_path / "new").exists()


def test_ranks_begin_alike(ranks: Callable[[int], Ranks], packed: Path, first: Path, tmp_path: Path) -> None:
    def at(name: str) -> Run:
        return runs.tiny(packed, tmp_path, *PRECISE, "method.name=uda", f"model.init={first}", f"name={name}")

    pretrain(at("alone"), job.prepare(at("alone"), 1))
    ranks(2).run(pretrain, at("two"), job.prepare(at("two"), 2))
    check_equal(of_backbone(at("two").run_dir), of_backbone(at("alone").run_dir), 1e-6)
    assert run_folder.trained(at("two"), at("two").run_dir)  # whose config does not say which weights those were
