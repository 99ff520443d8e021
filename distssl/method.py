"""The interface of a method, and how one is found by its name."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from distssl import methods, weights
from distssl.config import Run
from distssl.errors import ConfigError
from distssl.nn import backbones, optim
from distssl.nn.micro_batches import MicroBatches
from distssl.nn.per_sample import Embedded
from distssl.weights import Weights

M = TypeVar("M", bound=nn.Module)


class Options(BaseModel):
    """A method's own options: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    small: ClassVar[dict[str, Any]]  # options that use every part and take a moment, for `verify` and tests


class Method(nn.Module, ABC):
    """A method of self-supervised learning: a backbone, whatever it adds to it, and the loss as its forward.

    Concrete methods are final. State that a restart needs is a module or a buffer; where the run is, the loop says.
    """

    Config: ClassVar[type[Options]] = Options
    learns_from_labels: ClassVar[bool] = False  # then views named "labelled.NAME" come from `labelled_views`
    embeds: ClassVar[bool] = False  # then `on_epoch_start` gets what `embed` makes of the whole dataset
    balances_clusters: ClassVar[bool] = False  # then an epoch draws as many samples of each of `clusters`

    epoch = 0  # of the step being taken, from 0
    num_steps = 0  # optimiser steps done
    progress = 0.0  # their share of the run's

    def __init__(self, cfg: Any, backbone: backbones.Backbone) -> None:
        super().__init__()
        self.cfg = cfg
        self.backbone = backbone
        self.build()

    @abstractmethod
    def build(self) -> None:
        """Add heads, teachers and buffers to self.backbone."""

    @classmethod
    @abstractmethod
    def views(cls, cfg: Any, sample: Any) -> dict[str, Any]:
        """The DALI graph: a data.Sample -> {name: DataNode}. Pretext labels are views too."""

    @classmethod
    def reads_masks(cls, cfg: Any) -> bool:
        """Whether `views` reads the samples' masks."""
        return False

    @classmethod
    def labelled_views(cls, cfg: Any, sample: Any) -> dict[str, Any]:
        """The graph of the second stream, of labelled images, for a method that learns from labels."""
        raise NotImplementedError

    @classmethod
    def check_labels(cls, cfg: Any, num_classes: int) -> None:
        """Raises ConfigError where it cannot learn from labels of so many classes."""

    @abstractmethod
    def loss(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """ "loss", this rank's scalar to be minimised after DDP's mean; other scalars are logged.

        "embeddings", if there, [V, N, D] without gradient, feeds the monitor's health figures.
        """

    def forward(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.loss(views)

    def take_parts(self, parts: MicroBatches) -> None:
        """Let the backbone, and a teacher's, see the batch part by part."""
        for module in self.modules():
            if isinstance(module, backbones.Backbone):
                module.micro_batches = parts

    def on_epoch_start(self, epoch: int, features: Embedded | None = None) -> dict[str, float]:
        """Before an epoch's first step; what is returned is logged, as if of that step.

        features: of every sample, each rank its share, where `wants_features` says so. Every rank must return the same.
        """
        return {}

    def wants_features(self, epoch: int) -> bool:
        """Whether the dataset is embedded before this epoch."""
        return self.embeds

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Evaluation crops [N, 3, H, W] -> [N, D], for `on_epoch_start`; in evaluation mode, without gradient."""
        return self.backbone(images)

    def clusters(self) -> torch.Tensor | None:
        """The cluster of each sample for this epoch, int64 [num_samples], -1 for none: for sampling and the monitor."""
        return None

    @property
    def num_clusters(self) -> int:
        """K of `clusters`."""
        raise NotImplementedError

    def made_anew(self) -> list[nn.Parameter]:
        """What `on_epoch_start` has initialised again: the optimiser forgets its momentum."""
        return []

    def on_step_end(self, progress: float) -> None:
        """After each optimiser step; progress is the share of the run's steps done, in (0, 1]."""

    def evaluated(self) -> backbones.Backbone:
        """The network that evaluation is to see: the backbone, unless the method has a better one."""
        return self.backbone

    def rate(self, name: str, parameter: nn.Parameter) -> optim.Rate:
        """The learning rate of one of the method's parameters, by its name, relative to the run's."""
        return optim.Rate()

    @classmethod
    def view_size_px(cls, cfg: Any) -> int:
        """The side of the images the backbone is trained on, which evaluation uses as well."""
        return cfg.augment.size_px

    def picture(self, views: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What TensorBoard shows of the first samples, without gradient: [N, 3, H, W] each, normalised as views are.

        By default every image among the views; a method shows what its network is asked, and answers.
        """
        return [view for view in views.values() if view.ndim == 4 and view.shape[1] == 3]


def names() -> list[str]:
    """The methods there are: the files of distssl/methods."""
    return sorted(module.name for module in pkgutil.iter_modules(methods.__path__))


@functools.cache
def find(name: str) -> type[Method]:
    """The method in distssl/methods/NAME.py. Raises ConfigError naming the nearest for an unknown name."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names())}"
        raise ConfigError(f"method.name={name!r}: unknown method; {hint}")
    module = importlib.import_module(f"{methods.__name__}.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__file__} defines {len(found)} methods; one is right")
    return found[0]


def options(name: str) -> type[Options]:
    """The schema of a method's options."""
    return find(name).Config


def build(run: Run, start: Weights | None = None) -> Method:
    """The untrained method of a run: the same parameters wherever it is built. start: the backbone's, if not random.

    Raises ConfigError where those are of another network.
    """
    chosen = find(run.method.name)

    def untrained() -> Method:
        backbone = backbones.build(run.model.backbone, run.model.stem, run.model.sobel, **run.model.options)
        if start:
            weights.load(start, backbone, run.model)  # here, for teachers are copies
        return chosen(chosen.Config(**run.method.options), backbone)

    return seeded(run.seed, untrained)


def seeded(seed: int, make: Callable[[], M]) -> M:
    """What `make` makes with torch's generator at `seed`; the generator of others is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
