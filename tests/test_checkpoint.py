"""Checkpoints: whole or not there, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distssl import checkpoint, mirrored
from distssl.context import Context
from distssl.errors import ConfigError
from tests import disks

ROOT = Path(__file__).parent.parent


def state(step: int) -> dict:
    return {"step": step, "model": {"w": torch.full((3, 2), float(step))}, "note": "ä", "list": [1, (2, 3.5)]}


def write(run_dir: Path, step: int, **metrics: float) -> Path:
    return checkpoint.write(run_dir, step, state(step), metrics)


def steps(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted(checkpoint.folder(run_dir).glob("step_*"))]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write(tmp_path, 7, loss=0.5)
    assert path == tmp_path / "checkpoints" / "step_00000007"
    assert sorted(file.name for file in path.iterdir()) == [checkpoint.MANIFEST, checkpoint.STATE]
    back = checkpoint.read(path)
    assert torch.equal(back["model"]["w"], torch.full((3, 2), 7.0))
    assert (back["step"], back["note"], back["list"]) == (7, "ä", [1, (2, 3.5)])
    assert json.loads((path / checkpoint.MANIFEST).read_text())["metrics"] == {"loss": 0.5}
    assert [entry.name for entry in checkpoint.folder(tmp_path).iterdir()] == [path.name]


def test_a_snapshot_does_not_follow_later_steps() -> None:
    weight, inner = torch.ones(3, requires_grad=True), torch.zeros(2)
    taken = checkpoint.snapshot({"w": weight, "list": [inner, (inner, 1)], "text": "a"})
    with torch.no_grad():
        weight.mul_(5)
        inner.add_(1)
    assert torch.equal(taken["w"], torch.ones(3))
    assert not taken["w"].requires_grad
    assert torch.equal(taken["list"][0], torch.zeros(2))
    assert torch.equal(taken["list"][1][0], torch.zeros(2))
    assert (taken["list"][1][1], taken["text"]) == (1, "a")


def test_a_snapshot_of_an_optimizer_is_what_load_state_dict_takes(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    path = checkpoint.write(tmp_path, 1, checkpoint.snapshot({"optimizer": optimizer.state_dict()}), {})
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.5)
    other.load_state_dict(checkpoint.read(path)["optimizer"])
    assert other.param_groups[0]["lr"] == 0.1
    assert torch.equal(next(iter(other.state.values()))["exp_avg"], next(iter(optimizer.state.values()))["exp_avg"])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:-1]), "bytes, its manifest"),
        (lambda path: (path / "state.pt").write_bytes(b""), "bytes, its manifest"),
        (lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path / "manifest.json").write_text('{"step": 1, "by'), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text("{}"), "cannot be read"),
        (lambda path: _flip_a_bit(path / "state.pt"), "sha256"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path: Path, damage, told: str) -> None:
    write(tmp_path, 1)
    path = write(tmp_path, 2)
    damage(path)
    with pytest.raises(ConfigError, match=told) as raised:
        checkpoint.read(path)
    assert str(path) in raised.value.messages[0]
    assert "\n" not in raised.value.messages[0]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest["step"] == 1
    checkpoint.prune(tmp_path, keep_last=2, keep_best="loss")  # reads the manifests, damaged ones among them
    assert steps(tmp_path) == [1, 2]


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for step in (1, 2):
        (write(tmp_path, step) / checkpoint.STATE).write_bytes(b"cut")
    with pytest.raises(ConfigError) as raised:
        checkpoint.newest(tmp_path)
    assert len(raised.value.messages) == 3
    assert "to start again" in raised.value.messages[-1]
    assert steps(tmp_path) == [1, 2]


def test_those_that_the_run_replaces_meanwhile_are_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    read = checkpoint.read

    def replaced(path: Path) -> dict:
        if path.name == "step_00000001":
            write(tmp_path, 2)
            shutil.rmtree(path)
        return read(path)

    monkeypatch.setattr(checkpoint, "read", replaced)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found["step"] == 2
    assert not caplog.records


def rank_1_cannot_read(run_dir: Path) -> tuple[int, int | str]:
    """Of a disk that fails for one rank: what it and the step that it would go on from."""
    with pytest.MonkeyPatch.context() as patch, Context(run_dir) as context:
        read = checkpoint.read

        def broken(path: Path) -> dict:
            if context.rank == 1 and path.name == "step_00000002":
                raise checkpoint.DamagedError("Stale file handle")
            return read(path)

        patch.setattr(checkpoint, "read", broken)
        try:
            state = mirrored.newest(context, run_dir)
        except ConfigError as error:
            return context.rank, str(error)
        assert state is not None
        return context.rank, state["step"]


def test_no_rank_goes_on_from_another_step(ranks, tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    assert ranks(2).run(rank_1_cannot_read, tmp_path) == [(0, "Stale file handle"), (1, "Stale file handle")]


class Planted:
    """Unpickling this makes a folder, as it could make anything."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_reading_runs_no_code_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    torch.save({"step": Planted(tmp_path / "planted")}, path / checkpoint.STATE)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest |= {"bytes": (path / checkpoint.STATE).stat().st_size}
    manifest |= {"sha256": checkpoint.sha256(path / checkpoint.STATE)}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="cannot be read") as raised:
        checkpoint.read(path)
    assert "\n" not in raised.value.messages[0]
    assert not (tmp_path / "planted").exists()
    assert pickle.dumps(Planted(tmp_path))  # and it is something that pickles


@pytest.mark.parametrize(
    ("keep_best", "keep_last", "kept"),
    [("knn", 2, [2, 5, 6]), ("loss", 2, [3, 5, 6]), (None, 1, [6]), ("knn", 6, [1, 2, 3, 4, 5, 6]), ("f1", 2, [5, 6])],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, keep_best: str | None, keep_last: int, kept: list[int]
) -> None:
    knn = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.3, 6: 0.2}  # step 5 was never evaluated
    for step in range(1, 7):
        metrics = {"loss": abs(step - 3.0)} | ({"knn": knn[step]} if step in knn else {})
        checkpoint.write(tmp_path, step, state(step), metrics)
    checkpoint.prune(tmp_path, keep_last=keep_last, keep_best=keep_best)
    assert steps(tmp_path) == kept


@pytest.mark.parametrize(
    ("metric", "best"),
    [("loss", 1), ("reconstruction", 1), ("simclr/loss", 1), ("accuracy", 2), ("psnr", 2), ("knn", 2)],
)
def test_the_best_is_the_lowest_of_what_is_better_when_lower(metric: str, best: int) -> None:
    assert checkpoint.kept({1: 0.1, 2: 0.9, 3: 0.5}, 1, metric, ()) == {best, 3}


def test_a_metric_that_there_is_none_of_is_told_with_those_there_are(caplog: pytest.LogCaptureFixture) -> None:
    for known in (None, "knn", "loss"):
        checkpoint.warn_of_unknown(known, {"loss": 1.0, "accuracy": 0.5})
    assert not caplog.records
    checkpoint.warn_of_unknown("acuracy", {"loss": 1.0, "accuracy": 0.5})
    (told,) = [record.getMessage() for record in caplog.records]
    assert "checkpoint.keep_best=acuracy: no such metric" in told
    assert told.endswith("accuracy, loss")


WRITER = """
import sys, torch
from pathlib import Path
from distssl import checkpoint
big = torch.arange(5_000_000, dtype=torch.float64)
step = 1
while True:
    checkpoint.write(Path(sys.argv[1]), step, {"step": step, "big": big + step}, {})
    checkpoint.prune(Path(sys.argv[1]), keep_last=2, keep_best=None)
    step += 1
"""


def test_a_kill_in_mid_write_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for seed in range(3):
        run_dir = tmp_path / str(seed)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(run_dir)], cwd=ROOT)
        try:
            deadline = time.monotonic() + 60
            while not _writing(run_dir, after=2 + seed) and time.monotonic() < deadline:
                time.sleep(0.001)
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        there = steps(run_dir)
        newest = checkpoint.newest(run_dir)
        assert newest is not None
        assert newest["step"] == there[-1]  # the newest of that name is whole: none was passed over
        assert torch.equal(newest["big"], torch.arange(5_000_000, dtype=torch.float64) + newest["step"])
        checkpoint.write(run_dir, there[-1] + 1, state(0), {})
        checkpoint.prune(run_dir, keep_last=1, keep_best=None)
        assert [path.name for path in checkpoint.folder(run_dir).iterdir()] == [f"step_{there[-1] + 1:08d}"]


def _writing(run_dir: Path, after: int) -> bool:
    """Whether a step later than `after` is half written."""
    halves = [path / checkpoint.STATE for path in checkpoint.folder(run_dir).glob(".step_*")]
    return any(int(half.parent.name[6:14]) > after and half.exists() for half in halves)


def test_a_damaged_checkpoint_of_the_same_step_is_written_anew(tmp_path: Path) -> None:
    (write(tmp_path, 3) / checkpoint.STATE).write_bytes(b"cut")
    assert checkpoint.read(write(tmp_path, 3))["step"] == 3


def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path: Path) -> None:
    with disks.small(tmp_path / "disk", megabytes=1) as run_dir:
        path = write(run_dir, 1)
        with pytest.raises(ConfigError, match="No space left"):
            checkpoint.write(run_dir, 2, {"big": torch.zeros(4 << 20)}, {})
        assert list(checkpoint.folder(run_dir).iterdir()) == [path]
        assert checkpoint.read(path)["step"] == 1
