"""A run folder belongs to one process at a time, for as long as that lives and no longer."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from distssl import config, job, monitor, run_folder
from distssl.config import Run
from distssl.context import Context, stop_file
from distssl.errors import ConfigError
from tests import runs

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys, time
from pathlib import Path
from distssl import config, run_folder
with run_folder.alone(config.parse(Path(sys.argv[1]).read_text(), "")):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def run(packed: Path, tmp_path: Path) -> Run:
    return runs.tiny(packed, tmp_path, "train.epochs=1", "eval.tasks=[]")


@contextmanager
def held_elsewhere(run: Run) -> Iterator[subprocess.Popen[str]]:
    """Another process has the run's folder, until it is killed."""
    run.run_dir.parent.mkdir(exist_ok=True)
    file = run.run_dir.parent / "held.yaml"
    file.write_text(config.dump(run))
    with subprocess.Popen([sys.executable, "-c", HOLDER, file], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_second_start_is_refused_and_changes_nothing(run: Run) -> None:
    job.prepare(run, 1)
    stop_file(run.run_dir).touch()
    before = (run.run_dir / run_folder.CONFIG).read_bytes()
    with held_elsewhere(run):
        other = run.model_copy(update={"machine": run.machine.model_copy(update={"threads": 2})})
        with pytest.raises(ConfigError, match=r"another process trains this run.*name=ANOTHER") as refused:
            job.prepare(other, 1)
    assert len(refused.value.messages) == 1
    assert stop_file(run.run_dir).exists()
    assert (run.run_dir / run_folder.CONFIG).read_bytes() == before


def test_a_killed_process_has_let_go(run: Run) -> None:
    with held_elsewhere(run) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        job.prepare(run, 1)


def refused(run: Run, folders: job.Folders) -> str:
    with pytest.MonkeyPatch.context() as patch, Context(run.run_dir) as context:
        patch.setattr(run_folder, "DYING_S", 0.1)
        with pytest.raises(ConfigError) as told:
            job.pretrain(run, context, folders)
    return told.value.messages[0]


def test_every_rank_is_told_where_another_process_came_first(ranks, run: Run) -> None:
    folders = job.prepare(run, 2)
    (run.run_dir / monitor.METRICS).write_text('{"step": 99}\n')
    with held_elsewhere(run):
        told = ranks(2).run(refused, run, folders)
    assert all(message.startswith(f"{run.run_dir}: another process trains this run") for message in told)
    assert monitor.read_jsonl(run.run_dir / monitor.METRICS) == [{"step": 99}]


def test_workers_that_are_started_again_wait_for_the_end_of_those_before(run: Run) -> None:
    folders = job.prepare(run, 1)
    with held_elsewhere(run) as process, Context(run.run_dir) as context:
        killer = threading.Timer(0.5, process.kill)
        killer.start()
        assert job.pretrain(run, context, folders)
        assert process.wait() == -signal.SIGKILL
    with run_folder.alone(run):  # and it has let go itself
        pass
