"""The command line with run folders in a bucket: what comes of it is what comes of a local run, on whatever host."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distssl import checkpoint, config, job, mirror, monitor, run_folder, sweep
from distssl.config import Run
from distssl.context import Context
from distssl.downstream.rows import read_summary
from distssl.errors import ConfigError
from distssl.remote import Remote
from tests import runs
from tests.buckets import Unreliable
from tests.conftest import Said

ROOT = Path(__file__).parent.parent
launch = importlib.import_module("launch")
EPOCHS, STEPS = 3, 21
SETTINGS = [
    "name=demo",
    "train.precision=float64",
    f"train.epochs={EPOCHS}",
    "eval.tasks=[knn]",
    "eval.labels=[null]",
    "checkpoint.every=4",
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"))


def pretrain_here(run: Run) -> None:
    data = job.prepare(run, 1)
    with Context(run.run_dir) as context:
        assert job.pretrain(run, context, data)


@pytest.fixture(scope="module")
def local(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the same run that lies on this disk, which nobody stopped."""
    run = runs.tiny(packed, tmp_path_factory.mktemp("local"), *SETTINGS)
    pretrain_here(run)
    return run.run_dir


def tiny(packed: Path, cache: Path, bucket: str, *more: str) -> Run:
    return runs.tiny(packed, cache, *SETTINGS, f"machine.storage={bucket}/runs", f"machine.cache={cache}", *more)


def fetched(bucket: str, folder: Path) -> Path:
    """All that lies at the URL of the run."""
    there = Remote(f"{bucket}/runs/demo")
    for name in there.names():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        there.get(name, folder / name)
    return folder


def tree(folder: Path) -> set[str]:
    """The names of files, of events the beginning; without what evaluations keep for themselves, and locks."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = (name for name in names if not name.startswith("features/") and ".lock" not in name and name != ".place")
    return {name.partition(".tfevents")[0] for name in kept}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in monitor.read_jsonl(folder / monitor.METRICS) if "loss" in row]


def parameters(folder: Path) -> dict[str, Any]:
    state = checkpoint.newest(folder)
    assert state is not None
    assert state["step"] == STEPS
    return {name: value for name, value in state["model"].items() if value.is_floating_point()}


def check_same(there: Path, local: Path) -> None:
    assert tree(there) == tree(local)
    assert losses(there) == losses(local)
    assert len(losses(there)) == STEPS
    assert monitor.read_jsonl(there / monitor.LEDGER) == monitor.read_jsonl(local / monitor.LEDGER)
    assert read_summary(there) == read_summary(local)
    torch.testing.assert_close(parameters(there), parameters(local), rtol=1e-12, atol=0)


def test_the_tree_at_the_store_is_that_of_a_local_run(packed: Path, local: Path, bucket: str, tmp_path: Path) -> None:
    run = tiny(packed, tmp_path / "cache", bucket)
    pretrain_here(run)
    check_same(fetched(bucket, tmp_path / "there"), local)
    assert config.differences(config.parse((tmp_path / "there" / run_folder.CONFIG).read_text(), "there"), run) == []
    assert run.run_dir.is_relative_to(tmp_path / "cache")


def test_a_run_in_a_bucket_starts_from_another_there(packed: Path, local: Path, bucket: str, tmp_path: Path) -> None:
    """On a host that has neither run's folder; learning so little that what it began with is seen at its end."""
    pretrain_here(tiny(packed, tmp_path / "cache", bucket))
    still = ["train.lr=1e-12", "train.weight_decay=0", f"model.init={bucket}/runs/demo", "name=from_demo"]
    run = tiny(packed, tmp_path / "another", bucket, *still)
    pretrain_here(run)
    found = parameters(run.run_dir)
    for name, value in parameters(local).items():
        if name.startswith("backbone.") and "running" not in name:
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8)  # it was kept in float32
    shutil.rmtree(tmp_path / "another")  # and a finished run is one on any host
    pretrain_here(run)


def test_a_store_that_fails_now_and_then_changes_nothing(
    packed: Path, local: Path, unreliable: Unreliable, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each checkpoint finds the store out for a while."""
    put = checkpoint.write

    def write(*args: Any) -> Path:
        unreliable.fail_for(0.7)
        return put(*args)

    monkeypatch.setattr(checkpoint, "write", write)
    pretrain_here(tiny(packed, tmp_path / "cache", bucket))
    assert unreliable.refused > 3
    check_same(fetched(bucket, tmp_path / "there"), local)


def test_a_killed_run_goes_on_on_a_fresh_host(packed: Path, local: Path, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(config.dump(runs.tiny(packed, tmp_path, *SETTINGS)))

    def command(cache: Path) -> list[str]:
        where = ["--config", str(tmp_path / "run.yaml"), "--storage", f"{bucket}/runs", f"machine.cache={cache}"]
        return [sys.executable, "launch.py", "pretrain", *where]

    there = Remote(f"{bucket}/runs/demo")
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(command(tmp_path / "a"), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 240
    while not any(name.endswith(checkpoint.MANIFEST) for name in there.names("checkpoints")):
        assert first.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.02)
    first.kill()
    first.wait()
    reached = max(checkpoint.step_of(name) for name in there.names("checkpoints"))
    assert reached < STEPS
    shutil.rmtree(tmp_path / "a")
    done = subprocess.run(command(tmp_path / "b"), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming at step " in done.stderr
    check_same(fetched(bucket, tmp_path / "there"), local)


@pytest.fixture
def stored(local: Path, bucket: str) -> str:
    """The URL of that run in a bucket."""
    there = Remote(f"{bucket}/runs/demo")
    for name in tree(local) - {"events.out"}:
        there.put(name, local / name)
    return there.url


def test_what_cannot_be_used_is_told_in_one_line(
    command: Callable[..., Said], packed: Path, stored: str, tmp_path: Path
) -> None:
    place = [f"data.source={packed}", f"machine.cache={tmp_path}", "machine.workers=0", "name=demo"]
    before = fetched(stored.removesuffix("/runs/demo"), tmp_path / "before")
    for arguments, told in (
        (["pretrain", "--storage", "s3://nobodys-bucket/runs", *place], "s3://nobodys-bucket/runs/demo: "),
        (["pretrain", "--storage", "z3://bucket/runs", *place], "machine.storage='z3://bucket/runs': "),
        (["pretrain", "--storage", stored.removesuffix("/demo"), *place], f"{stored} holds another run: "),
        (["evaluate", f"{stored}-none", f"machine.cache={tmp_path}"], f"{stored}-none: no run there"),
        (["export", f"{stored}-none", "--format", "timm"], f"{stored}-none: no run there"),
        (["compare", f"{stored}-none"], f"{stored}-none: no run there"),
    ):
        code, _, err = command(*arguments)
        assert code == 2, err
        assert any(line.startswith(f"error: {told}") for line in err), err
        assert not any("Traceback" in line for line in err)
    after = fetched(stored.removesuffix("/runs/demo"), tmp_path / "after")
    assert {name: (before / name).read_bytes() for name in tree(before)} == {
        name: (after / name).read_bytes() for name in tree(after)
    }


def test_a_run_in_a_bucket_is_evaluated_compared_and_exported(
    command: Callable[..., Said],
    local: Path,
    stored: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mirror, "PUSH_EVERY_S", 0.1)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fit = ["eval.fit.steps=2", "eval.fit.batch=8", 'eval.backbones=["pretrained"]', "eval.num_seeds=1"]
    code, out, err = command("evaluate", stored, "--task", "knn,finetune", *fit)
    assert code == 0, err
    assert f"run folder:  {stored}" in out
    there = Remote(stored)
    rows = json.loads(there.read("summary.json") or b"{}")["rows"]
    found = {(row["backbone"], row["task"], row["metric"]): row["value"] for row in rows}
    ours = {(row.backbone, row.task, row.metric): row.value for row in read_summary(local)}
    assert {key: found[key] for key in ours} == ours  # kNN of the same checkpoint
    assert ("pretrained", "finetune", "accuracy") in found
    assert sum(name.endswith("result.json") for name in there.names("fits")) == 1
    assert there.read(monitor.METRICS) == (local / monitor.METRICS).read_bytes()

    shutil.rmtree(tmp_path / "home")  # another host: what is finished is not done again
    monkeypatch.setattr("distssl.downstream.fit.Fitting", None)
    assert command("evaluate", stored, "--task", "finetune", *fit)[0] == 0

    code, out, err = command("compare", stored, local, "--out", tmp_path / "compare")
    assert code == 0, err
    assert "report.html" in out
    code, out, err = command("export", stored, "--format", "safetensors")
    assert code == 0, err
    assert there.names("export") == ["export/MODEL_CARD.md", "export/safetensors.safetensors"]


def test_a_sweep_of_runs_in_a_bucket_lies_there(stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tree = {"name": "tiny", "runs": [stored], "space": {"eval.neighbours": {"choice": [1, 3]}}, "task": "knn"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    storage = stored.replace("runs/demo", "sweeps")
    swept = sweep.load(tmp_path / "sweep.yaml", [f"storage={storage}"])
    chosen = sweep.trial(swept, {"eval.neighbours": 3})
    assert chosen.command("knn").startswith(f"python launch.py evaluate {stored} --task knn ")
    assert chosen.run.eval.neighbours == 3
    sweep.claim(swept)
    sweep.claim(swept)
    outcome = sweep.Outcome(0, {"eval.neighbours": 3}, 0.5, None)
    sweep.keep(swept, [outcome])
    there = Remote(f"{storage}/tiny")
    assert there.names() == ["outcomes.jsonl", "sweep.yaml"]
    assert json.loads(there.read("outcomes.jsonl") or b"")["value"] == 0.5
    shutil.rmtree(tmp_path / "home")
    with pytest.raises(ConfigError, match=f"{storage}/tiny: holds another sweep"):
        sweep.claim(swept.model_copy(update={"num_trials": 5}))
    with pytest.raises(ConfigError, match=f"runs: {stored}-none: no run there"):
        sweep.load(tmp_path / "sweep.yaml", [f"storage={storage}", f"runs=[{stored}-none]"])
