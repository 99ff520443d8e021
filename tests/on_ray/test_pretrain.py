"""Runs on a real Ray whose processes are killed: what comes out is what an undisturbed run gives.

Every process is known by its place below the driver that started it, so no other Ray on the machine is touched.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from distssl import checkpoint, config, job, monitor
from distssl.context import Context
from distssl.data.shards import Dataset
from distssl.on_ray import place
from tests import disks, processes, runs

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 240  # for anything a busy machine may take its time with
NUM_IMAGES, GLOBAL_BATCH, EPOCHS = 245, 16, 3  # 15 steps an epoch and a remainder of 5 images
STEPS_PER_EPOCH = NUM_IMAGES // GLOBAL_BATCH
RAY = ("launch.py", "pretrain", "--workers=2")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "launch.py", "pretrain")
SETTINGS = [
    "train.precision=float64",  # so that the order of a sum over ranks is all but invisible,
    "train.lr=0.01",  # also after three epochs
    f"train.epochs={EPOCHS}",
    "model.options={width: 24}",
    "eval.tasks=[]",
    "checkpoint.every=4",
]
KNN = ["eval.every=1", "eval.tasks=[knn]"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"), num=NUM_IMAGES)


@pytest.fixture(scope="module")
def undisturbed(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run by this process, without Ray, that nobody stopped; it waited for its evaluations."""
    run = runs.tiny(packed, tmp_path_factory.mktemp("undisturbed"), "name=undisturbed", *SETTINGS, *KNN)
    with Context(run.run_dir) as context:
        assert job.pretrain(run, context, job.prepare(run, 1))
    return run.run_dir


class Driver:
    """`launch.py pretrain` with two workers, in a process group of its own as a shell would start it."""

    def __init__(
        self,
        source: Path,
        storage: Path,
        *overrides: str,
        launcher: Sequence[str] = RAY,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.run_dir = storage / "disturbed"
        self.log = storage / "driver.log"
        run = runs.tiny(source, storage, "name=disturbed", *SETTINGS)
        (storage / "run.yaml").write_text(config.dump(run))
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "--config", storage / "run.yaml", *overrides],
                cwd=ROOT,
                env=os.environ | (environ or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.seen: set[processes.Process] = set()
        self.seen_workers: list[processes.Process] = []

    def wait_for_step(self, step: int) -> None:
        """Until metrics.jsonl has the step, with the driver alive."""
        path = self.run_dir / monitor.METRICS
        self._until(lambda: any(row["step"] >= step for row in monitor.read_jsonl(path)), f"step {step}")

    def wait_for_resumption(self, times: int) -> None:
        """Until its log has told so many times of one."""
        self._until(lambda: self.log.read_text().count("resuming at step") == times, f"resumption {times}")

    def kill(self) -> None:
        """kill -9 of the driver alone; its workers have to end by themselves."""
        self.seen_workers = processes.ray_workers(self.process.pid)
        self.seen |= processes.below(self.process.pid)
        self.process.kill()
        self.process.wait()

    def workers_are_gone(self, timeout_s: float = 30) -> bool:
        """Whether the workers end with the driver; Ray's agents, which take a minute longer, are ended here."""
        deadline = time.monotonic() + timeout_s
        while (alive := any(worker.is_alive() for worker in self.seen_workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in self.seen:
            process.kill()
        return not alive

    def exit_code(self) -> int:
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        """End what a failed test left, and nothing else."""
        self.seen |= processes.below(self.process.pid)
        self.process.kill()
        self.process.wait()
        for process in self.seen:
            process.kill()

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self.process.poll() is None, f"the driver ended before {what}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {what} after {WAIT_S} s:\n{self.log.read_text()}"
            time.sleep(0.02)


@pytest.fixture
def start(packed: Path, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def started(*overrides: str, **options: Any) -> Driver:
        drivers.append(Driver(packed, tmp_path, *overrides, **options))
        return drivers[-1]

    yield started
    for driver in drivers:
        driver.close()


def actors(driver: Driver) -> set[str]:
    """The kinds of Ray's actors that run, which poll all the time: no more than have something to do."""
    lines = [found.command_line() for found in processes.below(driver.process.pid)]
    of_ray = {line.removeprefix("ray::").partition(".")[0].strip() for line in lines if line.startswith("ray::")}
    return of_ray - {"IDLE", "DashboardAgent", "RuntimeEnvAgent"}


def check_saved_where_it_stopped(run_dir: Path) -> int:
    """With an epoch left; the step."""
    saved = max(int(path.name.removeprefix("step_")) for path in checkpoint.folder(run_dir).glob("step_*"))
    assert 2 <= saved < (EPOCHS - 1) * STEPS_PER_EPOCH
    assert monitor.read_jsonl(run_dir / monitor.METRICS)[-1]["step"] == saved
    return saved


def losses(run_dir: Path) -> list[float]:
    rows = [row for row in monitor.read_jsonl(run_dir / monitor.METRICS) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, EPOCHS * STEPS_PER_EPOCH + 1))
    return [row["loss"] for row in rows]


def check_nothing_shows(run_dir: Path, undisturbed: Path, packed: Path) -> None:
    """The disturbed run saw every sample once an epoch, but for the remainder, and has the undisturbed losses."""
    assert Dataset.open(packed).num_samples == NUM_IMAGES
    ledger = monitor.read_jsonl(run_dir / monitor.LEDGER)
    for epoch in range(EPOCHS):
        times = Counter(i for row in ledger if row["epoch"] == epoch for i in row["ids"])
        assert set(times.values()) == {1}
        assert len(times) == NUM_IMAGES - NUM_IMAGES % GLOBAL_BATCH
    assert ledger == monitor.read_jsonl(undisturbed / monitor.LEDGER)
    assert losses(run_dir) == pytest.approx(losses(undisturbed), rel=1e-6)


def test_a_run_that_is_stopped_and_killed_in_every_way_goes_on_and_nothing_of_it_shows_in_the_result(
    start: Callable[..., Driver], undisturbed: Path, packed: Path
) -> None:
    """Ctrl-C under torchrun and under Ray, then kill -9 of the driver and of a worker: four starts of one run."""
    driver = start("checkpoint.every=1000", launcher=TORCHRUN)
    driver.wait_for_step(2)
    os.killpg(driver.process.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the driver and all it has started
    assert driver.exit_code() != 0
    assert driver.log.read_text().count("saving a checkpoint, then stopping") == 1
    saved = check_saved_where_it_stopped(driver.run_dir)

    before = len(driver.log.read_text())
    driver = start()
    driver.wait_for_step(saved + 1)
    os.killpg(driver.process.pid, signal.SIGINT)
    assert driver.exit_code() == 130, driver.log.read_text()
    said = driver.log.read_text()[before:]
    assert "stopped; the same command goes on from the last checkpoint" in said
    assert "Traceback" not in said
    saved = check_saved_where_it_stopped(driver.run_dir)

    driver = start()
    driver.wait_for_step(saved + 3)
    driver.kill()
    assert driver.workers_are_gone()
    assert monitor.read_jsonl(driver.run_dir / monitor.METRICS)[-1]["step"] < EPOCHS * STEPS_PER_EPOCH

    driver = start()
    driver.wait_for_resumption(3)
    workers = processes.ray_workers(driver.process.pid)
    assert len(workers) == 2
    assert actors(driver) == {"Desk", "RayTrainWorker", "SynchronizationActor", "TrainController"}
    workers[0].kill()
    assert driver.exit_code() == 0, driver.log.read_text()
    assert not any(worker.is_alive() for worker in workers)
    assert driver.log.read_text().count("resuming at step") == 4
    check_nothing_shows(driver.run_dir, undisturbed, packed)


def test_a_mistake_that_a_restart_cannot_mend_ends_the_run_with_one_line(start: Callable[..., Driver]) -> None:
    driver = start("train.lr=1e30", "train.warmup_epochs=0")
    assert driver.exit_code() == 1
    said = driver.log.read_text()
    assert said.count("error: the loss is") == said.count("error:") == 1
    assert "Traceback" not in said
    assert "resuming" not in said


@pytest.mark.slow  # in one process it is a test of test_launch.py, and a mistake of workers is the one before
def test_a_full_disk_ends_the_run_with_one_line(start: Callable[..., Driver], tmp_path: Path) -> None:
    with disks.small(tmp_path / "disk", megabytes=6) as disk:
        driver = start(f"machine.storage={disk}", "model.options={width: 48}", "checkpoint.every=1")
        assert driver.exit_code() == 2
    said = driver.log.read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert str(disk) in line
    assert "No space left" in line
    assert "Traceback" not in said


@pytest.fixture
def two_nodes() -> Iterator[dict[str, str]]:
    """What tells a command of a cluster here: a head without CPUs and a host with one."""
    # Without a port it takes 8265, and where another Ray has that, it leaves a socket to the collector.
    head = {"num_cpus": 0, "include_dashboard": False, "dashboard_port": None}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.add_node(num_cpus=1)
    yield {place.CLUSTER: "here", "RAY_ADDRESS": made.address}
    made.shutdown()


@pytest.mark.parametrize("where", ["this_machine", pytest.param("two_nodes", marks=pytest.mark.slow)])
def test_evaluations_beside_the_training_land_on_their_steps_and_need_no_more_than_workers_leave(
    start: Callable[..., Driver], where: str, request: pytest.FixtureRequest, undisturbed: Path
) -> None:
    """The figures of evaluations that training waits for, with training as it was."""
    environ = request.getfixturevalue(where) if where == "two_nodes" else None
    driver = start("machine.eval_cpus=1", *KNN, "--workers=1", environ=environ)
    assert driver.exit_code() == 0, driver.log.read_text()
    assert losses(driver.run_dir) == pytest.approx(losses(undisturbed), rel=1e-6)
    found, expected = (
        {row["step"]: row["knn"] for row in monitor.read_jsonl(run_dir / monitor.METRICS) if "knn" in row}
        for run_dir in (driver.run_dir, undisturbed)
    )
    assert list(sorted(found)) == [(epoch + 1) * STEPS_PER_EPOCH for epoch in range(EPOCHS)]
    assert found == expected
    kept = checkpoint.folder(driver.run_dir).glob("step_*")
    told = [json.loads((path / checkpoint.MANIFEST).read_text())["metrics"] for path in kept]
    assert any("knn" in metrics for metrics in told)
