"""The main job on Ray Train: a TorchTrainer whose workers run distssl.pretrain, restarted when they die."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.metrics import Gauge

from distssl import atomic
from distssl.config import Run
from distssl.context import Context
from distssl.errors import ConfigError, RunError
from distssl.job import Folders, pretrain

log = logging.getLogger(__name__)

MOST_FAILURES = 5  # of workers in one run; preemptions are not counted by Ray
OUTCOME = ".outcome.*.json"  # the star is a worker's rank
GRACE_S = 10  # between the first worker that tells of a mistake and the last, where all of them met it
ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the dashboard's Train tab
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or every line comes twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody preempts the machine the driver runs on
    "PYTHONWARNINGS": "ignore:`ExecutionOptions.exclude_resources",  # Ray's own use of what it deprecates
}
GAUGES = ("loss", "lr", "images_per_s", "data_wait", "effective_rank", "knn", "epoch", "eta_s", "num_bad")


class RayContext(Context):
    """A worker of a Ray Train run; Ray has set up the process group."""

    def __init__(self, run_dir: Path, eval_cpus: int | None = None) -> None:
        super().__init__(run_dir)
        self._eval_cpus = eval_cpus
        self._evaluations: dict[Any, int] = {}  # what Ray will give -> the step it is of
        self._gauges = {name: Gauge(f"distssl_{name}", tag_keys=("run",)) for name in GAUGES}
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": run_dir.name})

    def commit(self, write: Callable[[], Path], metrics: Mapping[str, float]) -> None:
        if self.rank != 0:
            train.report(dict(metrics))
            return
        # Ray calls `write` in a background thread instead of copying the folder it is given, which is empty.
        train.report(
            dict(metrics),
            checkpoint=train.Checkpoint(tempfile.mkdtemp(prefix="distssl-")),
            checkpoint_upload_mode=train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=lambda _checkpoint, _name: self._written(write),
            delete_local_checkpoint_after_upload=True,
        )

    def _written(self, write: Callable[[], Path]) -> train.Checkpoint:
        try:
            return train.Checkpoint(str(write()))
        except ConfigError as error:
            _tell(self.run_dir, self.rank, error)
            raise

    def beside(self, evaluate: Callable[[], dict[str, float]], step: int) -> bool:
        if self._eval_cpus is None:
            return False
        if self.rank == 0:
            task = ray.remote(num_cpus=self._eval_cpus)(_evaluate)
            self._evaluations[task.remote(evaluate, self._eval_cpus)] = step
        return True

    def evaluated(self, wait: bool = False) -> list[tuple[int, dict[str, float]]]:
        started = list(self._evaluations)
        if not started:
            return []
        done, _ = ray.wait(started, num_returns=len(started), timeout=None if wait else 0)
        return [(self._evaluations.pop(found), ray.get(found)) for found in done]

    def pending(self) -> set[int]:
        return set(self._evaluations.values())

    def record(self, metrics: Mapping[str, float]) -> None:
        if self.rank == 0:
            for name in self._gauges.keys() & metrics.keys():
                self._gauges[name].set(metrics[name])


def _evaluate(evaluate: Callable[[], dict[str, float]], threads: int) -> dict[str, float]:
    """The whole of a task of Ray's."""
    torch.set_num_threads(threads)
    return evaluate()


def _work(job: dict[str, Any]) -> None:
    """One worker. What a restart cannot mend, and whether the job is finished, is left for the driver."""
    logging.getLogger().setLevel(logging.WARNING)  # Ray tells of every report under the name of a file of its own
    logging.getLogger("distssl").setLevel(logging.INFO)
    run: Run = job["run"]
    if any("finished" not in outcome for outcome in _outcomes(run.run_dir)):
        return
    with RayContext(run.run_dir, run.machine.eval_cpus) as context:
        try:
            finished = pretrain(run, context, job["folders"])
        except (ConfigError, RunError) as error:
            _tell(run.run_dir, context.rank, error)
            if not _all_told(run.run_dir, context.world_size):
                raise  # the others wait for this one in a collective: a restart ends them, and goes no further
            return
    if context.rank == 0:
        _tell(run.run_dir, 0, finished)


def _tell(run_dir: Path, rank: int, outcome: bool | ConfigError | RunError) -> None:
    """Leave for the driver whether the job is finished, or why it cannot be."""
    told: dict[str, Any]
    if isinstance(outcome, ConfigError):
        told = {"wrong_input": list(outcome.messages)}
    elif isinstance(outcome, RunError):
        told = {"failed": str(outcome)}
    else:
        told = {"finished": outcome}
    if "finished" not in told:
        logging.disable(logging.ERROR)  # the driver says it in one line, Ray would with a traceback
    with atomic.replacing(run_dir / OUTCOME.replace("*", str(rank))) as file:
        file.write_text(json.dumps(told))


def _outcomes(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(run_dir.glob(OUTCOME))]


def _all_told(run_dir: Path, world_size: int) -> bool:
    deadline = time.monotonic() + GRACE_S
    while (some := len(_outcomes(run_dir)) < world_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not some


class _Trainer(TorchTrainer):
    """A TorchTrainer that leaves Ctrl-C to its caller."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's own would abort the run where ours asks it to save and stop."""


def run(run: Run, folders: Folders, workers: int) -> bool:
    """Run the job on a Ray started for it; False where somebody asked to stop before the end.

    Raises ConfigError or RunError as the workers did, and RunError where they kept dying.
    """
    kept = run.machine.eval_cpus or 0
    cpus = max(os.cpu_count() or 1, workers + kept)
    on_gpu = torch.cuda.is_available()
    _forget(run.run_dir)
    os.environ |= ENVIRONMENT
    ray.init(num_cpus=cpus, logging_level=logging.ERROR)
    trainer = _Trainer(
        _work,
        train_loop_config={"run": run, "folders": folders},
        scaling_config=train.ScalingConfig(
            num_workers=workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": (cpus - kept) // workers, "GPU": int(on_gpu)},
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=train.RunConfig(
            name=run.run_name,
            storage_path=str(run.machine.storage),
            failure_config=train.FailureConfig(max_failures=MOST_FAILURES),
            logging_config=train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise RunError(f"workers failed more than {MOST_FAILURES} times, at last: {last_line(error)}") from error
    finally:
        ray.shutdown()
        outcomes = _outcomes(run.run_dir)
        _forget(run.run_dir)
    for outcome in outcomes:
        if "wrong_input" in outcome:
            raise ConfigError(*outcome["wrong_input"])
        if "failed" in outcome:
            raise RunError(outcome["failed"])
    (outcome,) = outcomes
    return outcome["finished"]


def _forget(run_dir: Path) -> None:
    """Remove what workers told and what Ray notes of checkpoints: the run itself knows which there are."""
    for name in ("checkpoint_manager_snapshot.json", ".validate_storage_marker", OUTCOME):
        for path in run_dir.glob(name):
            path.unlink()


def last_line(error: BaseException) -> str:
    """What an error says at its end: Ray puts a traceback before it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
