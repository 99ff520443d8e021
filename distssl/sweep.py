"""A sweep: many evaluations of one task, each at a point of a space of hyperparameters, labels and backbones.

A point is drawn by Optuna from the results of earlier *batches* of trials, and a trial is stopped early by what earlier
batches reached at the same step. So which of a batch's trials ends first changes nothing, and a sweep is a function of
its file and its runs. A trial is an evaluation as `evaluate` does it, with its folder in the run's: a sweep that was
killed is started again from the first trial, and those that are done give their figures at once.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from distssl import atomic, config, mirror, run_folder, settings, stores
from distssl.config import Machine, Run, Section, TaskName
from distssl.downstream.rows import BACKBONES, LOWER_IS_BETTER, METRICS
from distssl.errors import ConfigError
from distssl.remote import Remote

FILE = "sweep.yaml"
OWN_KEYS = ("run", "backbone", "labels")  # of a space, beside the keys of a run's config that begin with eval.


class Dimension(Section):
    """What one key may be; one of these."""

    choice: list[Any] | None = Field(default=None, min_length=1)
    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = Field(default=None, description="both ends are possible")

    @model_validator(mode="after")
    def _is_one(self) -> Dimension:
        given = [(name, value) for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError("one of choice, uniform, log_uniform, integer is right")
        name, value = given[0]
        if name != "choice" and not value[0] < value[1]:
            raise ValueError(f"{name}={list(value)}: the smaller end first is right")
        if name == "log_uniform" and value[0] <= 0:
            raise ValueError("log_uniform must begin above 0")
        return self


class Halving(Section):
    """Successive halving: at steps first, first * factor, ... only the best 1/factor of the trials go on.

    Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020, https://arxiv.org/abs/1810.05934,
    whose asynchronous promotion compares with all trials that were there before; here with those of earlier batches.
    """

    first: PositiveInt = 50
    factor: int = Field(default=3, ge=2)

    def rungs(self, steps: int) -> list[int]:
        """The steps at which a trial of so many is compared."""
        num = math.ceil(math.log(max(steps / self.first, 1), self.factor))
        return [rung for nth in range(num) if (rung := self.first * self.factor**nth) < steps]


class Sweep(Section):
    name: str = Field(pattern=r"^[\w.-]+$")
    seed: int = 0
    runs: tuple[str, ...] = Field(min_length=1, description="folders or URLs; `run` in the space chooses among them")
    task: TaskName = "linear"
    metric: str = "accuracy"
    num_trials: PositiveInt = 12
    parallel: PositiveInt = Field(default=2, description="trials of a batch; part of the result, so not the machine's")
    workers: PositiveInt = Field(default=1, description="processes that share a trial's training")
    overrides: tuple[str, ...] = Field(default=(), description="key=value, the same for all trials")
    space: dict[str, Dimension] = Field(min_length=1)
    halving: Halving | None = Halving()
    storage: str = Field(default="runs/sweeps", validate_default=True, description="a folder or a URL")

    @field_validator("space", mode="after")
    @classmethod
    def _known_keys(cls, space: dict[str, Dimension]) -> dict[str, Dimension]:
        for key in space:
            if key not in OWN_KEYS and not key.startswith("eval."):
                raise ValueError(f"{key}: {', '.join(OWN_KEYS)} or a key of a run's eval section is right")
        return space

    @field_validator("storage", mode="after")
    @classmethod
    def _absolute(cls, place: str) -> str:
        return stores.absolute(place)

    @property
    def mode(self) -> Literal["min", "max"]:
        return "min" if self.metric in LOWER_IS_BETTER else "max"

    @property
    def demand(self) -> tuple[int, str]:
        """Workers of a batch of trials, and what asks for them."""
        return self.parallel * self.workers, f"parallel={self.parallel} trials of workers={self.workers}"

    @property
    def url(self) -> str | None:
        """Where the sweep's folder lies, if that is no path."""
        return f"{self.storage}/{self.name}" if stores.is_url(self.storage) else None

    @property
    def folder(self) -> Path:
        """The sweep's folder, or this machine's copy of it."""
        if self.url:
            return mirror.working_copy(self.storage, self.name, Machine().cache / "sweeps")
        return Path(self.storage) / self.name


def load(file: Path, overrides: Sequence[str]) -> Sweep:
    """Read a YAML file with key=value overrides, and look at its runs. Raises ConfigError with a line a mistake."""
    sweep = parse(settings.read(file, overrides))
    for place in sweep.runs:
        try:
            run_folder.find(place)
        except ConfigError as error:
            raise ConfigError(*(f"runs: {message}" for message in error.messages)) from None
    for point in corners(sweep):
        trial(sweep, point)
    return sweep


def parse(tree: Mapping[str, Any]) -> Sweep:
    """What can be known without its runs. Raises ConfigError with a line a mistake."""
    try:
        sweep = Sweep.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(*(settings.explain(Sweep, item) for item in error.errors())) from None
    others = {str(point["run"]): None for point in corners(sweep) if point.get("run", sweep.runs[0]) not in sweep.runs}
    if others:
        nearest = ((place, *difflib.get_close_matches(place, sweep.runs, n=1, cutoff=0)) for place in others)
        raise ConfigError(*(f"space.run: {place}: is none of runs; nearest: {near}" for place, near in nearest))
    if sweep.metric not in METRICS[sweep.task]:
        raise ConfigError(f"metric={sweep.metric}: {sweep.task} has {', '.join(METRICS[sweep.task])}")
    return sweep


def corners(sweep: Sweep) -> list[dict[str, Any]]:
    """Points that take every choice and both ends of every range, to find mistakes before anything is run."""
    values = {
        key: dimension.choice or list(dimension.uniform or dimension.log_uniform or dimension.integer or ())
        for key, dimension in sweep.space.items()
    }
    longest = max(len(ends) for ends in values.values())
    return [{key: ends[nth % len(ends)] for key, ends in values.items()} for nth in range(longest)]


class Trial(Section):
    """One evaluation. place: the run's folder or URL; folder: that, or a copy on the machine this was made on."""

    place: str
    folder: Path
    run: Run
    backbone: Literal["random", "pretrained", "supervised"]
    labels: int | str | None

    def command(self, task: str) -> str:
        """The command line that does the same again."""
        own, ours = (
            config.science(config.parse((self.folder / run_folder.CONFIG).read_text(), self.folder)),
            config.science(self.run),
        )
        changed = {key: value for key, value in ours.items() if value != own.get(key)}
        keys = " ".join(f"'{key}={json.dumps(value)}'" for key, value in changed.items())
        return f"python launch.py evaluate {self.place} --task {task} {keys}"


def trial(sweep: Sweep, point: Mapping[str, Any]) -> Trial:
    """The evaluation at a point. Raises ConfigError where a value is not right."""
    place = stores.absolute(str(point.get("run", sweep.runs[0])))
    backbone, labels = point.get("backbone", "pretrained"), point.get("labels")
    if backbone not in BACKBONES:
        raise ConfigError(f"space.backbone: {backbone}: {', '.join(BACKBONES)} are right")
    changes = [f"{key}={json.dumps(value)}" for key, value in point.items() if key not in OWN_KEYS]
    changes += [f"eval.labels={json.dumps([labels])}", f'eval.backbones=["{backbone}"]', "eval.num_seeds=1"]
    found = run_folder.find(place, [*sweep.overrides, *changes])
    return Trial(place=place, folder=found.folder, run=found.run, backbone=backbone, labels=labels)


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: its value after so many steps (None: no steps), or why it failed."""

    number: int
    point: dict[str, Any]
    value: float | None
    step: int | None
    stopped: bool = False
    error: str | None = None


def ranked(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The best value first, then those that failed, and last those that were stopped, ranked likewise."""
    sign = 1 if sweep.mode == "min" else -1

    def place(outcome: Outcome) -> tuple[bool, float]:
        return outcome.stopped, math.inf if outcome.value is None else sign * outcome.value

    return sorted(outcomes, key=place)


def best(sweep: Sweep, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The trial of the best value among those that were not stopped; the first of several."""
    done = (outcome for outcome in ranked(sweep, outcomes) if outcome.value is not None and not outcome.stopped)
    return next(done, None)


def claim(sweep: Sweep) -> None:
    """Write the sweep's file into its folder. Raises ConfigError where the folder holds another sweep."""
    atomic.make_folder(sweep.folder)
    path = sweep.folder / FILE
    text = yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False)
    if sweep.url:
        there = Remote(sweep.url)
        found = there.read(FILE)
        there.check()
    else:
        found = path.read_bytes() if path.exists() else None
    if found is not None and found.decode() != text:
        raise ConfigError(f"{sweep.url or sweep.folder}: holds another sweep of this name; say name=ANOTHER")
    with atomic.replacing(path) as part:
        part.write_text(text)
    _put(sweep, path)


def lie_in(folder: Path) -> bool:
    """Whether sweeps lie in a folder."""
    return any(folder.glob(f"*/{FILE}"))


def keep(sweep: Sweep, outcomes: Sequence[Outcome]) -> None:
    """Write outcomes.jsonl into the sweep's folder: a line a trial."""
    path = sweep.folder / "outcomes.jsonl"
    with atomic.replacing(path) as part:
        part.write_text("".join(f"{json.dumps(asdict(outcome))}\n" for outcome in outcomes))
    _put(sweep, path)


def _put(sweep: Sweep, path: Path) -> None:
    if sweep.url:
        Remote(sweep.url).put(path.name, path)
