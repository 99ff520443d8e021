"""verify, evaluate and sweep on a cluster of two hosts: the figures are those of one process."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from distssl.downstream.rows import SUMMARY, Row, read_summary
from distssl.on_ray import jobs
from tests import buckets, runs
from tests.cluster.two_hosts import TwoHosts
from tests.cluster.user import ROOT

pytestmark = [pytest.mark.cloud, pytest.mark.timeout(900)]

FIT = ["eval.fit.steps=4", "eval.fit.batch=8", "eval.num_seeds=1", 'eval.labels=["3/class"]']


def test_verify_evaluate_and_sweep_on_two_hosts(pair: TwoHosts, store: buckets.Server, shared: Path) -> None:
    user, file = pair.user, pair.file()
    run = pretrained(shared)
    bucket = store.make_bucket("distssl-test")
    put(store, run, "runs/base")

    code, said = user.run("verify", "--cluster", file, "--world-sizes", "1,4")
    assert code == 2, said
    assert "error: --world-sizes 4: the cluster has room for 2 workers" in said
    code, said = user.run("verify", "--cluster", file, "--methods", "simsiam,rotation", "--world-sizes", "1,2")
    assert code == 0, said
    assert certified(said) == {(name, a, w) for name in ("simsiam", "rotation") for a in (1, 2) for w in (1, 2)}

    user.code = with_a_gradient_of_its_own(shared / "faulty")
    code, said = user.run("verify", "--cluster", file, "--methods", "barlow_twins", "--world-sizes", "2")
    assert code == 1, said
    assert "barlow_twins at 2 workers, 1 batches a step: worst of its state is " in said
    assert "error: a method does not take the same steps at every number of workers" in said
    user.code = ROOT

    alone = shutil.copytree(run, shared / "alone" / "base")
    command = ["--task", "knn,linear,finetune", *FIT]
    code, said = user.run("evaluate", alone, *command)
    assert code == 0, said
    code, said = user.run("evaluate", f"{bucket}/runs/base", *command, "--cluster", file)
    assert code == 0, said
    assert "2 Ray workers" in said
    (shared / "there").mkdir()
    (shared / "there" / SUMMARY).write_text(read(store, f"runs/base/{SUMMARY}"))
    assert len(figures(alone)) == 3 * 5
    assert figures(shared / "there") == figures(alone)

    sweep = ["sweep", "--config", sweep_file(shared, f"{bucket}/runs/base"), "--storage", f"{bucket}/sweeps"]
    first = user.start(*sweep, "--cluster", file)
    first.until(lambda said: "trial 0: " in said, "the end of a trial", 240)
    (address,) = [line.split()[-1] for line in first.said.splitlines() if line.startswith("dashboard:")]
    code, said = user.run("verify", "--address", address, "--methods", "simsiam", "--world-sizes", "4")
    assert code == 2, said
    assert "error: --world-sizes 4: the cluster has room for 2 workers" in said
    code, said = user.run("stop", "sweep-tiny", "--cluster", file)
    assert code == 0, said
    assert first.end(60) != 0, first.said
    code, said = user.run(*sweep, "--cluster", file)
    assert code == 0, said
    outcomes = [json.loads(line) for line in read(store, "sweeps/tiny/outcomes.jsonl").splitlines()]
    assert [outcome["error"] for outcome in outcomes] == [None] * 3
    (before,) = re.findall(r"trial 0: .*?\)", first.said)
    assert before in said
    assert f"\npython launch.py evaluate {bucket}/runs/base --task finetune " in said

    code, said = user.run("down", "--cluster", file)
    assert code == 0, said


def pretrained(shared: Path) -> Path:
    """The folder of a small run that all hosts see."""
    packed = runs.packed(shared / "photos", num=112)
    run = runs.trained(
        runs.tiny(packed, shared / "runs", "name=base", "train.epochs=1", "train.precision=float64", *FIT)
    )
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


def sweep_file(shared: Path, run: str) -> Path:
    tree = {
        "name": "tiny",
        "runs": [run],
        "task": "finetune",
        "num_trials": 3,
        "parallel": 2,
        "halving": {"first": 2, "factor": 2},
        "space": {"eval.fit.lr": {"log_uniform": [0.0003, 0.03]}, "labels": {"choice": ["3/class", "50%"]}},
    }
    path = shared / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def put(store: buckets.Server, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            store.client().upload_file(str(path), "distssl-test", f"{prefix}/{path.relative_to(folder).as_posix()}")


def read(store: buckets.Server, name: str) -> str:
    return store.client().get_object(Bucket="distssl-test", Key=name)["Body"].read().decode()
