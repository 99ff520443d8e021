"""A run's schema: what a YAML file and key=value overrides may say, checked all at once.

What decides the result (data order, views, model, optimiser) is kept apart from `machine`, which does not: a run may
be resumed with other workers, threads or storage, and is refused where anything else differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from distssl import mirror, settings, stores
from distssl.errors import ConfigError, first_line
from distssl.settings import Range

FROZEN_TASKS = ("knn", "linear", "retrieval", "cluster")  # on a frozen backbone's features
FITTED_TASKS = ("finetune", "segment", "detect", "depth", "keypoints")  # a network is trained
TASKS = (*FROZEN_TASKS, *FITTED_TASKS)

TaskName = Literal["knn", "linear", "retrieval", "cluster", "finetune", "segment", "detect", "depth", "keypoints"]
FewLabels = Annotated[str, Field(pattern=r"^(\d+(\.\d+)?%|[1-9]\d*/class)$")]  # "1%", "10/class"


class Section(BaseModel):
    """A part of the schema: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(Section):
    source: str = Field(min_length=1, description="folder, zip, CSV, torchvision dataset, tars or packed dataset")
    global_batch: PositiveInt = Field(
        default=256, description="images a step over all workers; never depends on their number"
    )
    lanes: PositiveInt | None = Field(
        default=None, description="null: the divisor of global_batch that suits most workers"
    )
    shuffle_window: PositiveInt = Field(default=2048, description="samples shuffled among themselves within a lane")
    labelled: str | None = Field(
        default=None, description="labelled images, for methods that learn from labels too; null: those of source"
    )
    labelled_batch: PositiveInt = Field(default=64, description="labelled images a step over all workers")
    num_labelled: PositiveInt | None = Field(default=None, description="labels to learn from; null: all there are")
    max_bad_fraction: float = Field(default=0.05, ge=0, le=1)
    max_pixels: PositiveInt = Field(default=50_000_000, description="larger images are refused from their header")


class Method(Section):
    """The method's name; its other keys are checked by the method's own Config."""

    model_config = ConfigDict(frozen=True, extra="allow")
    name: str = "simclr"

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Model(Section):
    backbone: str = "resnet50"
    stem: Literal["7x7_s2_pool", "3x3_s2", "3x3_s1"] = "7x7_s2_pool"
    sobel: bool = Field(default=False, description="the backbone sees two edge images instead of colours")
    options: dict[str, Any] = Field(default={}, description="more arguments of the backbone's constructor")
    init: str | None = Field(
        default=None, description="a run, or a safetensors file of `export`, to start from; null: random weights"
    )
    init_sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="of the weights at init; null: whatever they are"
    )

    @property
    def untrained(self) -> Model:
        """The network alone."""
        return self.model_copy(update={"init": None, "init_sha256": None})


class Train(Section):
    epochs: PositiveInt = 100
    optimizer: Literal["sgd", "adamw", "lars"] = "lars"
    lr: float = Field(default=0.3, gt=0, description="peak learning rate; never scaled behind your back")
    weight_decay: float = Field(default=1e-6, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    warmup_epochs: float = Field(default=10, ge=0)
    accumulate: PositiveInt = Field(default=1, description="global batches an optimiser step")
    micro_batch: PositiveInt | None = Field(
        default=None, description="images of the global batch in the backbone at a time, to save memory; null: all"
    )
    clip_norm: float | None = Field(default=None, gt=0)
    precision: Literal["auto", "bf16", "float32", "float64"] = Field(
        default="auto", description="auto: bf16 if all workers have it in hardware when the run begins, else float32"
    )
    log_every: PositiveInt = Field(default=10, description="optimiser steps")
    on_collapse: Literal["warn", "stop"] = Field(
        default="warn",
        description="when all embeddings are alike, or of one or two dimensions, three log lines in a row",
    )


class Checkpoint(Section):
    every: PositiveInt = Field(default=200, description="optimiser steps; one more at the end of the run")
    keep_last: PositiveInt = 2
    keep_best: str | None = Field(default="knn", description="metric of metrics.jsonl whose best checkpoint stays too")


class Fit(Section):
    """How a downstream task trains a network; null: the task's own recipe."""

    steps: PositiveInt | None = Field(default=None, description="optimiser steps, whatever the number of labels")
    batch: PositiveInt | None = Field(default=None, description="images a step over all workers, if there are as many")
    lr: float | None = Field(default=None, gt=0, description="peak learning rate of the head")
    layer_decay: float | None = Field(default=None, gt=0, le=1, description="a stage's rate over that of the one above")
    weight_decay: float | None = Field(default=None, ge=0)
    trained: Literal["all", "head"] | PositiveInt | None = Field(
        default=None, description="what learns: all, the head alone, or the head and so many of the last stages"
    )
    size_px: PositiveInt | None = Field(default=None, description="side of the views")
    window: Range | None = Field(default=None, description="side of the training window, share of image")
    flip: float | None = Field(default=None, ge=0, le=1)
    jitter: float | None = Field(default=None, ge=0, le=1, description="strength of the colour jitter")


class Eval(Section):
    source: str | None = Field(default=None, description="labelled images; null: data.source if it has labels")
    test_source: str | None = Field(default=None, description="null: a fifth of eval.source")
    every: PositiveInt | None = Field(default=10, description="epochs between kNN evaluations; null: at the end only")
    tasks: tuple[TaskName, ...] = ("knn", "linear")
    backbones: tuple[Literal["random", "pretrained", "supervised"], ...] | None = Field(
        default=None, description="rows of the table; null: all, but supervised by `evaluate` alone"
    )
    labels: tuple[PositiveInt | FewLabels | None, ...] = Field(
        default=(100, 1000, None), description='a number, a share ("1%"), so many a class ("10/class"); null: all'
    )
    num_seeds: PositiveInt = Field(default=3, description="label subsets and heads a row is averaged over")
    num_classes: PositiveInt | None = Field(
        default=None, description="of masks and boxes; null: one more than the largest that occurs"
    )
    size_px: PositiveInt | None = Field(default=None, description="null: the size of the views")
    crop: float = Field(default=0.875, gt=0, le=1, description="side of the centre crop, a share of the short side")
    neighbours: PositiveInt = Field(default=20, description="of the kNN classifier")
    inverse_l2: float = Field(default=0.1, gt=0, description="C of the linear probe's logistic regression")
    fit: Fit = Fit()


class Machine(Section):
    workers: int | None = Field(
        default=None, ge=0, description="null: one a GPU, else at most 2; 0: this process, no Ray"
    )
    threads: PositiveInt = Field(default=1, description="DALI's CPU threads a worker")
    prefetch: PositiveInt = Field(default=2, description="batches made ahead")
    eval_cpus: PositiveInt | None = Field(
        default=None, description="kept, under Ray, for evaluations beside the training; null: it waits for them"
    )
    cache: Path = Field(default=Path("~/.cache/distssl"), validate_default=True)
    cache_gb: float = Field(
        default=50, gt=0, description="bound of the tars kept in cache, where shards are on an object store"
    )
    download_threads: PositiveInt = Field(default=4, description="that fetch such tars ahead of use, a worker")
    retry_s: float = Field(default=120, gt=0, description="seconds a store may be away or overloaded")
    storage: str = Field(default="runs", validate_default=True, description="where run folders lie: a folder or a URL")
    ledger: bool = Field(default=False, description="write the sample ids of every step")

    @field_validator("cache", mode="after")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return stores.local(str(path)).absolute()  # Ray's workers run in another folder

    @field_validator("storage", mode="after")
    @classmethod
    def _absolute_or_url(cls, place: str) -> str:
        return stores.absolute(place)


class Run(Section):
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$", description="run folder; null: method_backbone_source")
    seed: int = Field(default=0, ge=0, lt=2**63)
    data: Data
    method: Method = Method()
    model: Model = Model()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    machine: Machine = Machine()

    @field_validator("name", mode="after")
    @classmethod
    def _not_dots(cls, name: str | None) -> str | None:
        if name in {".", ".."}:
            raise ValueError("a run needs a name of its own")
        return name

    @property
    def run_name(self) -> str:
        """The run folder's name: `name`, else method_backbone_source."""
        return self.name or f"{self.method.name}_{self.model.backbone}_{plain_name(self.data.source)}"

    @property
    def run_url(self) -> str | None:
        """Where the run folder lies, if that is no path."""
        return f"{self.machine.storage}/{self.run_name}" if stores.is_url(self.machine.storage) else None

    @property
    def run_dir(self) -> Path:
        """The run folder, or this node's working copy of it."""
        if self.run_url:
            return mirror.working_copy(self.machine.storage, self.run_name, self.machine.cache / "runs")
        return Path(self.machine.storage) / self.run_name


def plain_name(source: str) -> str:
    """A source's name for folders, files and tables."""
    return Path(source.rstrip("/")).name.split(".")[0].replace(":", "-").replace("*", "")


def load(file: Path | None, overrides: Sequence[str], method_config: Callable[[str], type[BaseModel]]) -> Run:
    """Read a YAML file and apply key=value overrides.

    An override of data.source leaves out the file's name, eval.source and eval.test_source. method_config: method
    name -> schema of its options; raises ConfigError for an unknown name. Raises ConfigError with one message a
    mistake, all at once.
    """
    tree = settings.read_file(file) if file else {}
    if any(override.startswith("data.source=") for override in overrides):
        _forget_the_files_data(tree)
    mistakes = settings.override(tree, overrides)
    try:
        run = Run.model_validate(tree)
    except ValidationError as error:
        mistakes += [settings.explain(Run, item) for item in error.errors() if item["loc"] != ("method",)]  # told below
        run = None
    try:
        options = _method_options(tree, method_config)
    except ConfigError as error:
        mistakes += error.messages
        options = {}
    if mistakes or run is None:
        raise ConfigError(*mistakes)
    return run.model_copy(update={"method": Method(name=run.method.name, **options)})


def _forget_the_files_data(tree: dict[str, Any]) -> None:
    """A file's run name and labelled images belong to its own data.source: with another one they would mislead."""
    tree.pop("name", None)
    if isinstance(tree.get("eval"), dict):
        for key in ("source", "test_source"):
            tree["eval"].pop(key, None)


def _method_options(tree: Mapping[str, Any], method_config: Callable[[str], type[BaseModel]]) -> dict[str, Any]:
    """The method's options with its defaults filled in, as plain data."""
    section = tree.get("method", {})
    if not isinstance(section, Mapping):
        raise ConfigError(f"method={section!r}: a mapping with a name is right, for example method.name=simclr")
    options = {str(key): value for key, value in section.items() if key != "name"}
    schema = method_config(str(section.get("name", Method().name)))
    try:
        return schema.model_validate(options).model_dump(mode="json")
    except ValidationError as error:
        raise ConfigError(*(settings.explain(schema, item, prefix="method") for item in error.errors())) from None


def dump(run: Run) -> str:
    """The complete config as YAML."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def parse(text: str, where: object) -> Run:
    """What `dump` wrote, found somewhere. Raises ConfigError with a line for each key that is not of this version."""
    try:
        return Run.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: no YAML: {first_line(error)}") from None
    except ValidationError as error:
        raise ConfigError(*(f"{where}: {settings.explain(Run, item)}" for item in error.errors())) from None


def science(run: Run) -> dict[str, Any]:
    """What decides the result, as {dotted key: value}: not where it runs, nor what is written and when."""
    tree = run.model_dump(mode="json", exclude={"name", "machine", "checkpoint"})
    for free in ("log_every", "on_collapse"):
        tree["train"].pop(free)
    tree["model"].pop("init")  # its weights count, wherever they lie
    return dict(_flatten(tree))


def differences(there: Run, here: Run) -> list[str]:
    """The keys that decide the result and differ, one line each."""
    a, b = science(there), science(here)
    keys = [*a, *(key for key in b if key not in a)]
    return [f"{key}: {a.get(key)!r} there, {b.get(key)!r} here" for key in keys if a.get(key) != b.get(key)]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        rows += _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows
