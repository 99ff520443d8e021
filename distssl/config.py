"""A run's schema: what a YAML file and key=value overrides may say, checked all at once.

What decides the result (data order, views, model, optimiser) is kept apart from `machine`, which does not: a run may
be resumed with other workers, threads or storage, and is refused where anything else differs.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator

from distssl.errors import ConfigError

TASKS = ("knn", "linear")


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
    precision: Literal["auto", "bf16", "float32", "float64"] = "auto"
    log_every: PositiveInt = Field(default=10, description="optimiser steps")


class Checkpoint(Section):
    every: PositiveInt = Field(default=200, description="optimiser steps; one more at the end of the run")
    keep_last: PositiveInt = 2
    keep_best: str | None = Field(default="knn", description="metric whose best checkpoint is kept as well")


class Eval(Section):
    source: str | None = Field(default=None, description="labelled images; null: data.source if it has labels")
    test_source: str | None = Field(default=None, description="null: a fifth of eval.source")
    every: PositiveInt | None = Field(default=10, description="epochs between kNN evaluations; null: at the end only")
    tasks: tuple[Literal["knn", "linear"], ...] = TASKS
    labels: tuple[PositiveInt | None, ...] = Field(default=(100, 1000, None), description="null: all")
    num_draws: PositiveInt = Field(default=3, description="label subsets a row is averaged over")
    size_px: PositiveInt | None = Field(default=None, description="null: the size of the views")
    crop: float = Field(default=0.875, gt=0, le=1, description="side of the centre crop, a share of the short side")
    neighbours: PositiveInt = Field(default=20, description="of the kNN classifier")
    inverse_l2: float = Field(default=0.1, gt=0, description="C of the linear probe's logistic regression")


class Machine(Section):
    workers: int | None = Field(
        default=None, ge=0, description="null: one a GPU, else at most 2; 0: this process, no Ray"
    )
    threads: PositiveInt = Field(default=1, description="DALI's CPU threads a worker")
    prefetch: PositiveInt = Field(default=2, description="batches made ahead")
    cache: Path = Field(default=Path("~/.cache/distssl"), validate_default=True)
    storage: Path = Field(default=Path("runs"), validate_default=True, description="where run folders lie")
    ledger: bool = Field(default=False, description="write the sample ids of every step")

    @field_validator("cache", "storage", mode="after")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().absolute()  # Ray's workers run in another folder


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
        source = Path(self.data.source.rstrip("/")).name.split(".")[0].replace(":", "-").replace("*", "")
        return self.name or f"{self.method.name}_{self.model.backbone}_{source}"

    @property
    def run_dir(self) -> Path:
        return self.machine.storage / self.run_name


def load(file: Path | None, overrides: Sequence[str], method_config: Callable[[str], type[BaseModel]]) -> Run:
    """Read a YAML file and apply key=value overrides.

    An override of data.source leaves out the file's name, eval.source and eval.test_source. method_config: method
    name -> schema of its options; raises ConfigError for an unknown name. Raises ConfigError with one message a
    mistake, all at once.
    """
    tree = _read(file) if file else {}
    if any(override.startswith("data.source=") for override in overrides):
        _forget_the_files_data(tree)
    mistakes: list[str] = []
    for override in overrides:
        mistakes += _override(tree, override)
    try:
        run = Run.model_validate(tree)
    except ValidationError as error:
        mistakes += [_explain(Run, item) for item in error.errors() if item["loc"] != ("method",)]  # told below
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
        raise ConfigError(*(_explain(schema, item, prefix="method") for item in error.errors())) from None


def dump(run: Run) -> str:
    """The complete config as YAML."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)


def parse(text: str) -> Run:
    """What `dump` wrote. Raises ConfigError where it is not a config."""
    try:
        return Run.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"not a config of this version: {str(error).splitlines()[0]}") from None


def science(run: Run) -> dict[str, Any]:
    """What decides the result, as {dotted key: value}: everything but `name` and `machine`."""
    tree = run.model_dump(mode="json", exclude={"name", "machine"})
    for free in ("log_every",):
        tree["train"].pop(free)
    tree.pop("checkpoint")
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


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror}; a YAML file is right") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"--config {file}: holds {type(tree).__name__}; a mapping of sections is right")
    return tree


def _override(tree: dict[str, Any], override: str) -> list[str]:
    """Set one key=value in the tree; what is wrong with it."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return [f"{override!r}: key=value is right, for example train.epochs=20"]
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            return [f"{override!r}: {section} is a value and has no keys"]
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        return [f"{override!r}: the value is not YAML"]
    return []


def _explain(schema: type[BaseModel], item: Mapping[str, Any], prefix: str = "") -> str:
    """One pydantic error as one line: key, value, what would be right."""
    path = [str(part) for part in item["loc"]]
    key = ".".join([prefix, *path] if prefix else path)
    if item["type"] == "extra_forbidden":
        names = _names_at(schema, path[:-1])
        near = difflib.get_close_matches(path[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(names))}"
        return f"{key}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{key}: missing; say {key}=VALUE"
    return f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _names_at(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys a section knows."""
    for part in path:
        field = schema.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        schema = field.annotation
    return list(schema.model_fields)
