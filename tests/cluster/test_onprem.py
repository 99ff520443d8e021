"""Hosts of one's own by the list of onprem.yaml: a run's pages through launch.py's tunnel, the same cluster by the
address of its dashboard; verify, evaluate and sweep on two hosts, whose figures are those of one process."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from distssl import monitor
from distssl.downstream.rows import SUMMARY, Row, read_summary
from distssl.on_ray import jobs
from tests import browser, buckets, runs
from tests.cluster import hosts, pages
from tests.cluster.two_hosts import SETTINGS, TwoHosts
from tests.cluster.user import ROOT, wait

pytestmark = [pytest.mark.cloud, pytest.mark.timeout(900)]

BUCKET = "distssl-test"
BUCKET_URL = f"s3://{BUCKET}"
BEHIND_S = 30  # TensorBoard may be that much behind the terminal
LONG = [*SETTINGS, "train.epochs=4000", "train.log_every=200", "machine.workers=1"]
FIT = ["eval.fit.steps=4", "eval.fit.batch=8", "eval.num_seeds=1", 'eval.labels=["3/class"]']


@pytest.fixture(scope="module")
def store(pair: TwoHosts) -> Iterator[buckets.Server]:
    """An object store that both hosts and their user reach, with a bucket."""
    server = buckets.Server(hosts.GATEWAY)
    server.make_bucket(BUCKET)
    pair.reach(server)
    yield server
    server.close()


def test_the_pages_of_a_run_show_it_also_after_the_connection_was_cut(
    chromium: str, pair: TwoHosts, store: buckets.Server, shared: Path
) -> None:
    user = pair.user
    storage = f"{BUCKET_URL}/runs"
    file, packed = pair.file(), runs.packed(shared / "photos", num=112)
    start = ["--cluster", file, f"data.source={packed}", *LONG]
    run = user.start(*start, "name=seen", "--storage", storage)
    run.until(lambda said: "TensorBoard:" in said, "the addresses", 240)
    dashboard, token, board = (pages.printed(run.said, name) for name in ("dashboard", "its token", "TensorBoard"))

    password = (shared / "home" / token.removeprefix("cat ~/")).read_text()
    run.until(lambda said: "step " in said, "the first line of its log", 240)
    ((step, loss),) = re.findall(r"^step (\d+)/.* loss ([\d.]+)", run.said, re.MULTILINE)
    wait(lambda: int(step) in pages.losses(board), "the loss in TensorBoard", BEHIND_S, lambda: run.said)
    assert pages.losses(board)[int(step)] == pytest.approx(float(loss), abs=1e-3)
    with browser.started(shared / "profile") as page:
        with pair.training_paused():
            pages.check_curve(page, board)
            page.open(f"{dashboard}/#/jobs")
            pages.log_in(page, password)
            pages.check_jobs(page)
            pages.check_hosts(page, dashboard)
            assert pages.train_runs(dashboard, password) == [("seen", "RUNNING")]

        pair.network.hosts["head"].hang_up()
        run.until(lambda said: "the connection is lost" in said, "that the connection is lost", 60)
        run.until(lambda said: "step " in said.partition("the connection is lost")[2], "another step", 120)
        assert pages.losses(board)
        page.open("about:blank")
        page.open(f"{dashboard}/#/jobs")
        pages.check_jobs(page)

    code, said = user.run("status", "--address", dashboard)
    assert code == 0, said
    assert "seen-1" in said
    assert "running" in said
    code, said = user.run("stop", "seen", "--address", dashboard)
    assert code == 0, said
    assert "goes on from the last checkpoint" in said
    assert run.end(60) == 130, run.said
    kept = store.client().list_objects_v2(Bucket=BUCKET, Prefix="runs/seen/checkpoints/step_")
    assert kept["KeyCount"]

    code, said = user.run("verify", "--cluster", file, "--world-sizes", "1,4")
    assert code == 2, said
    assert "error: --world-sizes 4: the cluster has room for 2 workers" in said
    code, said = user.run("down", "--cluster", file)
    assert code == 0, said


@pytest.mark.slow  # as the next two; on a Ray of this machine alone, or on ranks, they are tests of the default suite
def test_verify_on_two_hosts(pair: TwoHosts, store: buckets.Server) -> None:
    user, file = pair.user, pair.file()
    code, said = user.run("verify", "--cluster", file, "--methods", "simsiam,rotation", "--world-sizes", "1,2")
    assert code == 0, said
    assert certified(said) == {(name, a, w) for name in ("simsiam", "rotation") for a in (1, 2) for w in (1, 2)}
    code, said = user.run("down", "--cluster", file)
    assert code == 0, said


@pytest.mark.slow
def test_a_run_its_evaluation_and_a_sweep_on_two_hosts(pair: TwoHosts, store: buckets.Server, shared: Path) -> None:
    user, file, packed = pair.user, pair.file(), runs.packed(shared / "images", num=112)
    other = user.start("--cluster", file, f"data.source={packed}", *SETTINGS, "name=other", "train.epochs=2")
    other.until(lambda said: "TensorBoard:" in said, "the addresses", 240)
    board = pages.printed(other.said, "TensorBoard")
    wait(lambda: pages.location(board) == str(shared / "runs"), "a TensorBoard of the other storage", 60)
    assert other.end(240) == 0, other.said
    assert "2 Ray workers" in other.said
    steps = monitor.read_jsonl(shared / "runs/other" / monitor.METRICS)
    assert steps[-1]["step"] == 2 * (112 // 16)
    assert {row.backbone for row in read_summary(shared / "runs/other")} == {"random", "pretrained"}

    run = pretrained(shared)
    put(store, run, "runs/base")
    alone = shutil.copytree(run, shared / "alone" / "base")
    command = ["--task", "knn,linear,finetune", *FIT]
    code, said = user.run("evaluate", alone, *command)
    assert code == 0, said
    code, said = user.run("evaluate", f"{BUCKET_URL}/runs/base", *command, "--cluster", file)
    assert code == 0, said
    assert "2 Ray workers" in said
    (shared / "there").mkdir()
    (shared / "there" / SUMMARY).write_text(read(store, f"runs/base/{SUMMARY}"))
    assert len(figures(alone)) == 3 * 5
    assert figures(shared / "there") == figures(alone)

    said = swept(pair, store, "tiny", num_trials=2)
    assert f"\npython launch.py evaluate {BUCKET_URL}/runs/base --task finetune " in said
    code, said = user.run("down", "--cluster", file)
    assert code == 0, said


@pytest.mark.slow
def test_a_planted_fault_is_seen_and_a_sweep_that_was_stopped_goes_on(
    pair: TwoHosts, store: buckets.Server, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, file = pair.user, pair.file()
    put(store, pretrained(shared, "again"), "runs/again")
    monkeypatch.setattr(user, "code", with_a_gradient_of_its_own(shared / "faulty"))
    code, said = user.run("verify", "--cluster", file, "--methods", "barlow_twins", "--world-sizes", "2")
    assert code == 1, said
    assert "barlow_twins at 2 workers, 1 batches a step: worst of its state is " in said
    assert "error: a method does not take the same steps at every number of workers" in said
    monkeypatch.undo()

    sweep = sweep_command(shared, "again", "stopped", num_trials=3)
    first = user.start(*sweep, "--cluster", file)
    first.until(lambda said: "trial 0: " in said, "the end of a trial", 240)
    (address,) = [line.split()[-1] for line in first.said.splitlines() if line.startswith("dashboard:")]
    code, said = user.run("verify", "--address", address, "--methods", "simsiam", "--world-sizes", "4")
    assert code == 2, said
    assert "error: --world-sizes 4: the cluster has room for 2 workers" in said
    code, said = user.run("stop", "sweep-stopped", "--cluster", file)
    assert code == 0, said
    assert first.end(60) != 0, first.said
    (before,) = re.findall(r"trial 0: .*?\)", first.said)
    assert before in swept(pair, store, "stopped", num_trials=3, run="again")
    code, said = user.run("down", "--cluster", file)
    assert code == 0, said


def pretrained(shared: Path, name: str = "base") -> Path:
    """The folder of a small run that all hosts see."""
    packed = runs.packed(shared / f"labelled-{name}", num=112)
    settings = [f"name={name}", "train.epochs=1", "train.precision=float64", *FIT]
    run = runs.trained(runs.tiny(packed, shared / "runs", *settings))
    (run.run_dir / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return run.run_dir


def with_a_gradient_of_its_own(folder: Path) -> Path:
    """The code, but that a rank does not get the gradients of others through what they sum."""
    for name in jobs.SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        folder.mkdir(exist_ok=True)
        copy(ROOT / name, folder / name)
    path = folder / "distssl" / "collectives.py"
    right = "return sum_(grad.clone(memory_format=torch.contiguous_format))"
    assert path.read_text().count(right) == 1
    path.write_text(path.read_text().replace(right, "return grad.clone()"))
    return folder


def certified(said: str) -> set[tuple[str, int, int]]:
    """Method, batches a step and number of workers of the rows of a certificate that hold."""
    rows = re.findall(r"(\w+) +│ +(\d) +│ +(\d) +│ equal +│.*│ holds +│", said)
    return {(name, int(batches), int(world_size)) for name, batches, world_size in rows}


def figures(folder: Path) -> list[Row]:
    return sorted(read_summary(folder), key=str)


def swept(pair: TwoHosts, store: buckets.Server, name: str, num_trials: int, run: str = "base") -> str:
    """Run a sweep to its end, where every trial has gone well; what it said."""
    command = sweep_command(pair.shared, run, name, num_trials)
    code, said = pair.user.run(*command, "--cluster", pair.file())
    assert code == 0, said
    outcomes = [json.loads(line) for line in read(store, f"sweeps/{name}/outcomes.jsonl").splitlines()]
    assert [outcome["error"] for outcome in outcomes] == [None] * num_trials
    return said


def sweep_command(shared: Path, run: str, name: str, num_trials: int) -> list[object]:
    tree = {
        "name": name,
        "runs": [f"{BUCKET_URL}/runs/{run}"],
        "task": "finetune",
        "num_trials": num_trials,
        "parallel": 2,
        "halving": {"first": 2, "factor": 2},
        "space": {"eval.fit.lr": {"log_uniform": [0.0003, 0.03]}, "labels": {"choice": ["3/class", "50%"]}},
    }
    path = shared / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ["sweep", "--config", path, "--storage", f"{BUCKET_URL}/sweeps"]


def put(store: buckets.Server, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            store.client().upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")


def read(store: buckets.Server, name: str) -> str:
    return store.client().get_object(Bucket=BUCKET, Key=name)["Body"].read().decode()
