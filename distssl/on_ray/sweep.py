"""A sweep on Ray Tune: Optuna proposes, successive halving stops, a TorchTrainer inside each trial trains."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import ray
from ray import train, tune
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.tune.experiment import Trial as RayTrial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.optuna import OptunaSearch

from distssl import job, run_folder, sweep
from distssl.context import Context
from distssl.errors import ConfigError, RunError, last_line
from distssl.on_ray import desk, network, place, waiting
from distssl.on_ray.trainer import Trainer
from distssl.run_folder import Found
from distssl.sweep import Dimension, Outcome, Sweep, Trial

log = logging.getLogger(__name__)

TUNE, TRAIN = "tune", "train"  # folders of Ray's, in the sweep's or the driver's copy of it
WORKER_FAILURES = 3  # of a trial's workers, which go on from their checkpoint
TRIAL_FAILURES = 1  # of a trial as a whole
WAIT_FOR_WORKERS_S = "300"  # then a trial whose workers do not come fails and is tried again, instead of hanging


def run(swept: Sweep, tell: Callable[[Outcome], None]) -> list[Outcome] | None:
    """Run all trials on a Ray started for it, or on the cluster whose head this is; None where a Ctrl-C was before.

    tell: called as each ends. All of them are kept in outcomes.jsonl too. Raises ConfigError where the folder holds
    another sweep, or there is no room for a batch of trials.
    """
    if not place.on_cluster():
        place.require_gpus(*swept.demand)
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", WAIT_FOR_WORKERS_S)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new one speaks at any verbosity
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    room = place.start(swept.demand[0])
    try:
        room.require(*swept.demand)
        sweep.claim(swept)
        outcomes = _run(swept, tell, room.share)
    finally:
        ray.shutdown()
    if len(outcomes) < swept.num_trials:
        return None  # after a Ctrl-C Tune ends as if all was done
    sweep.keep(swept, outcomes)
    return outcomes


def _run(swept: Sweep, tell: Callable[[Outcome], None], share: dict[str, int]) -> list[Outcome]:
    space = {key: _domain(dimension) for key, dimension in swept.space.items()}
    names = {key.replace(".", "_"): key for key in swept.space}  # Ray would take a dot for a nested dict
    search = OptunaSearch(
        tune_space({key.replace(".", "_"): domain for key, domain in space.items()}),
        metric=swept.metric,
        mode=swept.mode,
        seed=swept.seed,
    )
    here = {"address": ray.get_runtime_context().gcs_address, "folder": str(Path.cwd())}
    # The trial itself waits for its workers: it takes no CPU from them, and stays beside the driver and Ray's notes.
    beside_driver = tune.PlacementGroupFactory([{place.resource_of_this_host(): 0.001}])
    trainable = tune.with_resources(
        tune.with_parameters(_trial, swept=swept, names=names, share=share, **here), beside_driver
    )
    scheduler = EarlierBatches(swept)
    watcher = _Watcher(scheduler.numbers, names, swept.metric, tell)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(search, max_concurrent=swept.parallel, batch=True),
            scheduler=scheduler,
            num_samples=swept.num_trials,
            max_concurrent_trials=swept.parallel,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(swept.folder),
            verbose=0,
            callbacks=[watcher],
            failure_config=tune.FailureConfig(max_failures=TRIAL_FAILURES),
        ),
    )
    shutil.rmtree(swept.folder / TUNE, ignore_errors=True)  # what Ray noted of an earlier start
    with waiting.told():
        tuner.fit()
    return [watcher.outcomes[number] for number in sorted(watcher.outcomes)]


def tune_space(domains: dict[str, Any]) -> dict[str, Any]:
    """Tune's domains as Optuna's distributions."""
    return OptunaSearch.convert_search_space(domains)


def _domain(dimension: Dimension) -> Any:
    if dimension.choice is not None:
        # Optuna's categories are hashable
        return tune.choice([value if not isinstance(value, list) else tuple(value) for value in dimension.choice])
    if dimension.integer is not None:
        return tune.randint(dimension.integer[0], dimension.integer[1] + 1)
    if dimension.log_uniform is not None:
        return tune.loguniform(*dimension.log_uniform)
    assert dimension.uniform is not None
    return tune.uniform(*dimension.uniform)


class EarlierBatches(FIFOScheduler):
    """Stops a trial at a rung where it is not among the best 1/factor of the trials of earlier batches and itself."""

    def __init__(self, swept: Sweep) -> None:
        super().__init__()
        self.swept = swept
        self.numbers: dict[str, int] = {}  # by Ray's id of a trial
        self.reached: dict[int, dict[int, float]] = {}  # rung -> trial -> value

    def on_trial_add(self, tune_controller: Any, trial: RayTrial) -> None:
        self.numbers.setdefault(trial.trial_id, len(self.numbers))  # Tune adds one that it tries again once more

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        if self.swept.halving is None or "step" not in result:
            return TrialScheduler.CONTINUE
        number, step, value = self.numbers[trial.trial_id], result["step"], result[self.swept.metric]
        if step not in self.swept.halving.rungs(result["steps"]):
            return TrialScheduler.CONTINUE
        return TrialScheduler.CONTINUE if self.goes_on(number, step, value) else TrialScheduler.STOP

    def goes_on(self, number: int, rung: int, value: float) -> bool:
        """Whether trial `number` with this value at this rung goes on; kept for the batches after it."""
        assert self.swept.halving is not None
        reached = self.reached.setdefault(rung, {})
        reached[number] = value
        first_of_batch = number // self.swept.parallel * self.swept.parallel
        earlier = [other for trial, other in reached.items() if trial < first_of_batch]
        if len(earlier) < self.swept.halving.factor - 1:
            return True
        better = sum(other > value if self.swept.mode == "max" else other < value for other in earlier)
        return better < math.ceil((len(earlier) + 1) / self.swept.halving.factor)


class _Watcher(tune.Callback):
    """Collects what comes of trials, in their order."""

    def __init__(
        self, numbers: dict[str, int], names: dict[str, str], metric: str, tell: Callable[[Outcome], None]
    ) -> None:
        self.numbers, self.names, self.metric, self.tell = numbers, names, metric, tell
        self.outcomes: dict[int, Outcome] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Ray pickles callbacks for a restore that nobody does; what tells the user cannot be."""
        return self.__dict__ | {"tell": None}

    def on_trial_complete(self, iteration: int, trials: Sequence[RayTrial], trial: RayTrial, **info: Any) -> None:
        self._ended(trial, None)

    def on_trial_error(self, iteration: int, trials: Sequence[RayTrial], trial: RayTrial, **info: Any) -> None:
        self._ended(trial, last_line(trial.get_error() or RuntimeError("its processes died")))

    def _ended(self, trial: RayTrial, error: str | None) -> None:
        last = trial.last_result or {}
        error = error or last.get("error")
        value = None if error else last.get(self.metric)
        stopped = value is not None and last.get("step") != last.get("steps")
        point = {self.names[key]: value for key, value in trial.config.items()}
        outcome = Outcome(self.numbers[trial.trial_id], point, value, last.get("step"), stopped, error)
        self.outcomes[outcome.number] = outcome
        self.tell(outcome)


def _trial(
    point: dict[str, Any], *, swept: Sweep, names: dict[str, str], share: dict[str, int], address: str, folder: str
) -> None:
    """One trial, in a process of Tune's beside the driver: a TorchTrainer of its own."""
    os.environ |= place.ENVIRONMENT | {"RAY_ADDRESS": address}
    os.chdir(folder)  # the user's paths count from there, and Ray starts processes elsewhere
    chosen = sweep.trial(swept, {names[key]: value for key, value in point.items()})
    the_desk = desk.open_unnamed()
    trainer = Trainer(
        _work,
        # On a cluster no path counts from the driver's folder, which other hosts do not have.
        train_loop_config={
            "sweep": swept,
            "trial": chosen,
            "folder": None if place.on_cluster() else folder,
            "desk": the_desk,
        },
        **network.layout(swept.workers, share),
        run_config=train.RunConfig(
            name=f"trial_{tune.get_context().get_trial_id()}",
            storage_path=str(swept.folder / TRAIN),
            callbacks=[TuneReportCallback()],
            failure_config=train.FailureConfig(max_failures=WORKER_FAILURES),
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError:
        if not desk.outcomes(the_desk):
            raise  # its workers kept dying: Tune tries the trial again
    try:
        desk.result(desk.outcomes(the_desk))
    except (ConfigError, RunError) as error:
        tune.report({swept.metric: math.nan, "error": str(error)})


def _work(given: dict[str, Any]) -> None:
    """One worker of a trial; what it reports last is the trial's result. What a restart cannot mend is left for it."""
    if given["folder"]:
        os.chdir(given["folder"])
    the_desk = given["desk"]
    if desk.outcomes(the_desk):
        return
    swept: Sweep = given["sweep"]
    chosen: Trial = given["trial"]
    logging.getLogger().setLevel(logging.WARNING)
    every = swept.halving.first if swept.halving else None
    reported: list[int] = []

    def report(step: int, steps: int, metrics: dict[str, float]) -> None:
        reported.append(step)
        train.report({**metrics, "step": step, "steps": steps})

    with Context(chosen.folder) as context, desk.mistakes_told(the_desk):
        run_folder.require_on_every_host(Found(chosen.place, chosen.folder, chosen.run))
        metrics = job.evaluate_once(chosen.run, context, swept.task, chosen.backbone, chosen.labels, report, every)
        if not reported:
            train.report(metrics)
        if context.rank == 0:
            desk.tell(the_desk, 0, True)
