"""What the record of a run says of the gradient, who can read it, and what it does where it cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, cast

import boto3
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distssl import method, monitor, train
from distssl.config import Run
from distssl.context import Context
from distssl.data.quarantine import Entry
from distssl.data.shards import Dataset
from distssl.errors import ConfigError
from tests import disks, runs

PLAIN = [  # a step is then -lr times the gradient, and nothing else
    "train.precision=float64",
    "train.optimizer=sgd",
    "train.momentum=0",
    "train.weight_decay=0",
    "train.warmup_epochs=0",
    "train.epochs=1",
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"))


def parameters(of: method.Method) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in of.parameters()])


def train_two_steps(run: Run) -> list[float]:
    """How far each step moved the parameters, over its learning rate: the norm of the gradient it took."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    lengths = []
    with Context(run.run_dir) as context:
        training = train.Training(run, context, Dataset.open(Path(run.data.source)))
        batches = training.batches()
        for _ in range(2):
            before = parameters(training.method)
            training.take_step(batches)
            training._after_step()
            lengths.append(float((parameters(training.method) - before).norm() / training.metrics["lr"]))
        training.close()
    return lengths


def logged(run: Run) -> list[float]:
    return [row["gradient_norm"] for row in monitor.read_jsonl(run.run_dir / monitor.METRICS)]


@pytest.mark.parametrize("settings", [[], ["train.accumulate=2"], ["data.lanes=4", "train.micro_batch=8"]], ids=str)
def test_the_gradient_norm_is_that_of_the_global_batch(ranks, packed: Path, tmp_path: Path, settings: list) -> None:
    alone = runs.tiny(packed, tmp_path, "name=alone", *PLAIN, *settings)
    lengths = train_two_steps(alone)
    assert logged(alone) == pytest.approx(lengths, rel=1e-9)
    shared = runs.tiny(packed, tmp_path, "name=shared", *PLAIN, *settings)
    for of_rank in ranks(2).run(train_two_steps, shared):
        assert of_rank == pytest.approx(lengths, rel=1e-6)
    assert logged(shared) == pytest.approx(lengths, rel=1e-6)
    board = EventAccumulator(str(shared.run_dir))
    board.Reload()
    assert [point.value for point in board.Scalars("gradient_norm")] == pytest.approx(lengths, rel=1e-6)


def test_the_gradient_norm_is_that_before_clipping(packed: Path, tmp_path: Path) -> None:
    free, clipped = (
        runs.tiny(packed, tmp_path, f"name={name}", f"train.clip_norm={norm}", *PLAIN)
        for name, norm in (("free", "null"), ("clipped", 0.01))
    )
    train_two_steps(free)
    assert train_two_steps(clipped) == pytest.approx([0.01, 0.01], rel=1e-3)  # torch adds 1e-6 to the norm
    assert logged(clipped)[0] == pytest.approx(logged(free)[0], rel=1e-12)
    assert logged(free)[0] > 0.1


def test_the_gradient_norm_is_measured_where_it_is_logged_alone(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_measured = []
    of_torch = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda *args: num_measured.append(1) or of_torch(*args))
    often = runs.trained(runs.tiny(packed, tmp_path, "name=often", *PLAIN))
    assert len(num_measured) == len(logged(often)) == 7
    num_measured.clear()
    rarely = runs.trained(runs.tiny(packed, tmp_path, "name=rarely", *PLAIN, "train.log_every=3"))
    assert len(num_measured) == 3
    assert logged(rarely) == pytest.approx([logged(often)[step - 1] for step in (3, 6, 7)], rel=1e-9)


def test_a_quarantine_whose_last_line_a_power_cut_tore_is_gone_on_with(tmp_path: Path) -> None:
    at = {"source": "data.source", "shard": "a.tar", "offset": 512, "reason": "is torn"}
    bad = [cast(Entry, {"id": number, "key": f"k{number}", **at}) for number in range(3)]
    path = tmp_path / monitor.QUARANTINE
    path.write_text(f"{json.dumps(bad[0])}\n{json.dumps(bad[1])[:20]}")
    for _ in range(2):  # starts
        with closing(monitor.Monitor(tmp_path, step=5)) as record:
            record.quarantine(bad)
        assert monitor.read_jsonl(path) == bad


@contextmanager
def serving(program: str, *options: str, log: Path, environ: Mapping[str, str]) -> Iterator[str]:
    """A program of this environment that serves HTTP on a free port of loopback; its address once it answers."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [Path(sys.executable).parent / program, *options, "--host=127.0.0.1", f"--port={port}"]
    with open(log, "w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=file, env=environ)
    try:
        until = time.monotonic() + 120
        while answer(f"http://127.0.0.1:{port}/") is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def answer(url: str) -> bytes | None:
    """None where nobody answers, or with an error."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as found:
            return found.read()
    except OSError:
        return None


def test_tensorboard_follows_a_run_on_s3_that_is_not_done(tmp_path: Path) -> None:
    losses = [4.0, 2.0, 1.0, 0.5]
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with ExitStack() as stack:
        record = stack.enter_context(closing(monitor.Monitor(tmp_path / "demo", 0)))
        s3 = stack.enter_context(serving("moto_server", log=tmp_path / "s3.log", environ=os.environ | keys))
        store: Any = boto3.Session("test", "test", region_name="us-east-1").client("s3", endpoint_url=s3)
        store.create_bucket(Bucket="team")
        environ = os.environ | keys | {"AWS_ENDPOINT_URL": s3}
        log = tmp_path / "tensorboard.log"
        options = ("--logdir=s3://team/runs", "--reload_interval=1")
        board = stack.enter_context(serving("tensorboard", *options, log=log, environ=environ))
        (events,) = (tmp_path / "demo").glob("events.*")
        for step, loss in enumerate(losses, 1):
            size = events.stat().st_size
            record.log(step, {"loss": loss})
            until = time.monotonic() + 60
            while events.stat().st_size == size:  # of a thread of TensorBoard's, which is not flushed
                assert time.monotonic() < until, "nothing came to the disk"
                time.sleep(0.01)
            store.upload_file(str(events), "team", f"runs/demo/{events.name}")
            while scalars(board) != list(enumerate(losses[:step], 1)):
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.3)


def scalars(board: str) -> list[tuple[int, float]]:
    """Steps and losses of the run demo that a TensorBoard shows."""
    found = answer(f"{board}/data/plugin/scalars/scalars?run=demo&tag=loss")
    return [(step, value) for _, step, value in json.loads(found or b"[]")]


def log_much(record: monitor.Monitor) -> None:
    for step in range(1, 1000):  # the first lines may fit into the last block
        record.log(step, {"loss": 1.0})


def test_a_disk_too_full_for_another_line_is_told_in_one_line(tmp_path: Path) -> None:
    with disks.small(tmp_path / "disk", megabytes=1) as disk:
        record = monitor.Monitor(disk, step=0)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(ConfigError, match=r"metrics\.jsonl: the disk is full"):
            log_much(record)
