"""Sweeps on Ray: what is tried is a function of the file, whatever is killed on the way."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from ray.tune.experiment import Trial as RayTrial

from distssl import job, report, sweep
from distssl.context import Context
from distssl.errors import ConfigError
from distssl.on_ray.sweep import EarlierBatches
from distssl.sweep import Halving, Outcome, Sweep
from tests import disks, processes, runs

ROOT = Path(__file__).parent.parent.parent
STEPS = 9  # of a trial


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swept")
    packed = runs.packed(folder)
    run = runs.trained(
        runs.tiny(packed, folder, "name=base", "train.epochs=1", f"eval.fit.steps={STEPS}", "eval.fit.batch=8")
    )
    (run.run_dir / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return run.run_dir


def written(folder: Path, run: Path, **changes: Any) -> Path:
    """A sweep's file."""
    tree = {
        "name": "tiny",
        "runs": [str(run)],
        "task": "finetune",
        "num_trials": 3,
        "parallel": 2,
        "halving": {"first": 3, "factor": 2},
        "storage": str(folder / "sweeps"),
        "space": {
            "backbone": {"choice": ["pretrained", "random"]},
            "labels": {"choice": ["3/class", "50%"]},
            "eval.fit.lr": {"log_uniform": [0.0003, 0.03]},
        },
    }
    folder.mkdir(exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def start(file: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch.py"), "sweep", "--config", str(file)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environ)


def outcomes(file: Path) -> list[dict[str, Any]]:
    lines = (file.parent / "sweeps/tiny/outcomes.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def copied(run: Path, to: Path) -> Path:
    """The run without what evaluations of it have left."""
    to.mkdir(parents=True)
    subprocess.run(["cp", "-r", run / "config.yaml", run / "checkpoints", to], check=True)
    return to


@pytest.mark.timeout(5400)
@pytest.mark.parametrize(("num_trials", "driver_too"), [(3, False), pytest.param(12, True, marks=pytest.mark.slow)])
def test_a_sweep_that_is_killed_and_interrupted_is_the_loop_of_its_search_and_its_trials(
    pretrained: Path, tmp_path: Path, num_trials: int, driver_too: bool
) -> None:
    """kill -9 of a trial's worker, Ctrl-C, kill -9 of the driver; the best again, by the command it prints."""
    patience_s = 200 * num_trials
    whole = written(tmp_path / "whole", copied(pretrained, tmp_path / "whole" / "run"), num_trials=num_trials)
    expected = [asdict(outcome) for outcome in by_optuna_alone(sweep.load(whole, []))]

    broken = written(tmp_path / "broken", copied(pretrained, tmp_path / "broken" / "run"), num_trials=num_trials)
    fits = tmp_path / "broken" / "run" / "fits"
    sweeping = start(broken)
    wait_for(lambda: any(begun(fit) for fit in fits.glob("*")), patience_s)
    processes.ray_workers(sweeping.pid)[0].kill()
    wait_for(lambda: list(fits.glob("*/result.json")), patience_s)
    sweeping.send_signal(signal.SIGINT)
    said, _ = sweeping.communicate(timeout=patience_s)
    assert sweeping.returncode == 130, said
    assert "stopped; the same command goes on with what is left of the trials" in said
    assert "the best again" not in said
    assert "Traceback" not in said
    assert not (tmp_path / "broken/sweeps/tiny/outcomes.jsonl").exists()  # no half of them

    if driver_too:
        sweeping = start(broken)
        there = len(list(fits.glob("*/result.json")))
        wait_for(lambda: len(list(fits.glob("*/result.json"))) > there, patience_s)
        wait_for(lambda: any(begun(fit) for fit in fits.glob("*")), patience_s)
        left_behind = processes.below(sweeping.pid)
        sweeping.kill()
        sweeping.communicate()
        for process in left_behind:  # the machine is gone, and Ray's processes with it
            process.kill()

    sweeping = start(broken)
    said, _ = sweeping.communicate(timeout=patience_s)
    assert sweeping.returncode == 0, said
    assert [plain(outcome, tmp_path) for outcome in outcomes(broken)] == [plain(o, tmp_path) for o in expected]

    swept = sweep.load(broken, [])
    best = sweep.best(swept, [Outcome(**outcome) for outcome in outcomes(broken)])
    assert best is not None
    assert report.outcome(best).startswith(f"trial {best.number}: {best.value:.4f}")
    again = said.splitlines()[-1]
    assert again.startswith("python launch.py evaluate ")
    done = subprocess.run(again, shell=True, cwd=ROOT, capture_output=True, text=True, env=with_python())
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "broken/run/summary.json").read_text())["rows"]
    assert best.value in [row["value"] for row in rows if row["metric"] == "accuracy"]


class StoppedError(Exception):
    """Raised at a rung by a trial that is not among the best half there."""


def by_optuna_alone(swept: Sweep) -> list[Outcome]:
    """What has to come of the sweep of `written`: Optuna asks and is told, this process trains, Ray has no part."""
    search = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=swept.seed))
    space: dict[str, optuna.distributions.BaseDistribution] = {
        "backbone": optuna.distributions.CategoricalDistribution(["pretrained", "random"]),
        "eval.fit.lr": optuna.distributions.FloatDistribution(0.0003, 0.03, log=True),
        "labels": optuna.distributions.CategoricalDistribution(["3/class", "50%"]),
    }
    outcomes: list[Outcome] = []
    earlier: list[dict[int, float]] = []  # the accuracies of earlier batches
    for start in range(0, swept.num_trials, swept.parallel):
        batch = [search.ask(space) for _ in range(min(swept.parallel, swept.num_trials - start))]
        reached = [accuracies(swept, trial.params, earlier) for trial in batch]
        for trial, by_step in zip(batch, reached, strict=True):
            step, value = max(by_step.items())
            search.tell(trial, value)
            outcomes.append(Outcome(trial.number, trial.params, value, step, stopped=step < STEPS))
        earlier += reached
    return outcomes


def accuracies(swept: Sweep, point: dict[str, Any], earlier: list[dict[int, float]]) -> dict[int, float]:
    """By step, of one trial: to its end, or to the rung, 3 or 6, where it is among the worse half."""
    chosen, found = sweep.trial(swept, point), {}

    def report(step: int, steps: int, metrics: dict[str, float]) -> None:
        found[step] = metrics["accuracy"]
        there = sorted((one[step] for one in (*earlier, found) if step in one), reverse=True)
        if step < steps and found[step] not in there[: math.ceil(len(there) / 2)]:
            raise StoppedError

    with Context(chosen.folder) as context, contextlib.suppress(StoppedError):
        job.evaluate_once(chosen.run, context, "finetune", chosen.backbone, chosen.labels, report, every=3)
    return found


def begun(fit: Path) -> bool:
    """Whether a network is on its way: it has a checkpoint and no result."""
    return any(fit.glob("checkpoints/step_*")) and not (fit / "result.json").exists()


@pytest.mark.slow  # as a full disk in test_pretrain.py
@pytest.mark.timeout(1200)
def test_a_mistake_of_one_rank_fails_its_trial(pretrained: Path, tmp_path: Path) -> None:
    """Rank 0 alone writes checkpoints, here onto a full disk, while rank 1 waits for it."""
    with disks.small(tmp_path / "disk", megabytes=8) as disk:
        run = copied(pretrained, disk / "run")
        (disk / "full").write_bytes(bytes(shutil.disk_usage(disk).free - (64 << 10)))
        file = written(tmp_path / "sweep", run, num_trials=1, parallel=1, workers=2)
        said, _ = (process := start(file)).communicate(timeout=900)
        assert process.returncode == 1, said
        (outcome,) = outcomes(file)
    assert "No space left on device" in outcome["error"]
    assert "no trial ended well" in said
    assert "Traceback" not in said


def with_python() -> dict[str, str]:
    """`python` is the one of the tests."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def plain(outcome: dict[str, Any], folder: Path) -> str:
    return json.dumps(outcome, sort_keys=True).replace(str(folder / "broken"), "").replace(str(folder / "whole"), "")


def wait_for(look: Any, timeout_s: float = 120) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def test_a_trial_goes_on_if_it_is_among_the_best_of_earlier_batches() -> None:
    swept = Sweep(
        name="x",
        runs=("x",),
        parallel=2,
        halving=Halving(first=10, factor=2),
        space={"labels": {"choice": [1]}},  # type: ignore[dict-item]
    )
    scheduler = EarlierBatches(swept)
    assert [scheduler.goes_on(number, 10, value) for number, value in ((1, 0.2), (0, 0.6))] == [True, True]
    # Of 0.6, 0.2 and itself the best two go on; what is in its own batch does not matter.
    assert scheduler.goes_on(3, 10, 0.1) is False
    assert scheduler.goes_on(2, 10, 0.3) is True
    assert scheduler.goes_on(4, 20, 0.0) is True  # the first at this rung


def test_a_trial_that_is_tried_again_keeps_its_number() -> None:
    """As Tune does it: to try a trial again is to tell the scheduler of it again."""
    space: Any = {"labels": {"choice": [1]}}
    scheduler = EarlierBatches(Sweep(name="x", runs=("x",), parallel=2, space=space))
    trials = [RayTrial("_trial", stub=True, trial_id=name) for name in "abc"]
    for trial in (*trials[:2], trials[0], trials[2]):
        scheduler.on_trial_add(None, trial)
    assert scheduler.numbers == {"a": 0, "b": 1, "c": 2}


def test_rungs_are_below_the_number_of_steps() -> None:
    assert Halving(first=50, factor=3).rungs(450) == [50, 150]
    assert Halving(first=50, factor=3).rungs(451) == [50, 150, 450]
    assert Halving(first=50, factor=3).rungs(50) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"space": {"data.source": {"choice": ["x"]}}}, "a key of a run's eval section is right"),
        ({"space": {"eval.fit.lr": {"uniform": [1, 0]}}}, "the smaller end first"),
        ({"space": {"eval.fit.lr": {"log_uniform": [0, 1]}}}, "must begin above 0"),
        ({"space": {"eval.fit.lr": {"uniform": [0, 1], "choice": [1]}}}, "one of choice, uniform"),
        ({"space": {"eval.fit.steps": {"choice": [0]}}}, "eval.fit.steps=0"),
        ({"space": {"backbone": {"choice": ["best"]}}}, "random, pretrained, supervised"),
        ({"runs": ["nowhere"]}, "no run there"),
        ({"runs": ["s4://x/y"]}, "runs: s4://x/y: s4:// is not known; a path, or a URL such as s3://bucket/folder"),
        ({"space": {"run": {"choice": ["s4://x/y"]}}}, "space.run: s4://x/y: is none of runs; nearest: /"),
        ({"space": {"run": {"choice": ["bass"]}}}, "space.run: bass: is none of runs; nearest: /"),
        ({"space": {"run": {"integer": [0, 1]}}}, "space.run: 1: is none of runs; nearest: /"),
        ({"task": "segmentation"}, "task="),
        ({"task": "segment"}, "metric=accuracy: segment has miou, pixel_accuracy, f1"),
        ({"trials": 3}, "did you mean num_trials?"),
    ],
)
def test_a_wrong_sweep_is_told_in_a_line(pretrained: Path, tmp_path: Path, changes: dict, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep.load(written(tmp_path, pretrained, **changes), [])
    assert any(told in message for message in caught.value.messages), caught.value.messages
