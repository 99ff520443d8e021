"""The interface of a task that trains a network: a backbone, the task's head, its loss as the forward, and its score.

Tasks on frozen features (classify, retrieve, cluster) need none: they are functions of features.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from distssl import collectives
from distssl.config import Fit
from distssl.data import augment, pixels
from distssl.data.sample import Sample
from distssl.data.shards import Dataset
from distssl.data.windows import Window
from distssl.downstream.labels import Labelled
from distssl.nn.backbones import Backbone
from distssl.nn.optim import Rate

Views = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the same for every backbone. Names as in config.Fit."""

    steps: int = 400
    batch: int = 32
    lr: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05
    trained: str | int = "all"
    size_px: int = 128
    window: tuple[float, float] = (0.6, 1.0)
    flip: float = 0.5
    jitter: float = 0.4
    crop: float = 0.875  # of a classifier's test images, as eval.crop

    def asked(self, fit: Fit) -> Recipe:
        """With what the user's config says in place of the task's own."""
        return dataclasses.replace(self, **{key: value for key, value in fit if value is not None})


@dataclass(frozen=True)
class Facts:
    """What a head must know of its data."""

    num_classes: int = 0
    num_points: int = 0
    log_depth: float = 0.0  # the mean, of metres


class Network(nn.Module, ABC):
    """A backbone with a task's head. Concrete ones are final."""

    kind: ClassVar[str]  # of labels: labels.LABEL or one of annotations.KINDS
    target: ClassVar[str | None] = None  # "mask" or "depth", where the views read one
    recipe: ClassVar[Recipe] = Recipe()
    uses_pyramid: ClassVar[bool] = True  # of the backbone; else its features
    pictures_an_image: ClassVar[int] = 2  # of those `picture` gives

    def __init__(self, backbone: Backbone, facts: Facts, recipe: Recipe) -> None:
        super().__init__()
        self.backbone = backbone
        self.facts = facts
        self.how = recipe
        self.seed = 0  # of the fit, and
        self.step = 0  # where it is: for what a loss draws
        stages = backbone.stages()
        self._depth = {name: max(stages.values()) - stage for name, stage in stages.items()}  # 0: the last stage
        trained = {"all": len(stages), "head": 0}.get(str(recipe.trained), recipe.trained)
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(self._depth[name] < int(trained))
        maps = backbone.use_maps(recipe.size_px) if self.uses_pyramid else []
        self.map_channels = [channels for channels, _, _ in maps]
        self.build()

    @abstractmethod
    def build(self) -> None:
        """Add the head."""

    @classmethod
    @abstractmethod
    def facts_of(cls, data: Labelled, num_classes: int | None) -> Facts:
        """What the head must know. num_classes: eval.num_classes. Raises ConfigError where the labels are wrong."""

    @classmethod
    def views(cls, recipe: Recipe, sample: Sample) -> dict[str, Any]:
        """The graph of training images; by default a random window, its colours jittered, and its frame."""
        window = Window.drawn(sample, recipe.size_px, recipe.window, recipe.flip)
        image = augment.colour_jitter(window.image(), sample.draws, jitter(recipe))
        return {"image": augment.normalise(image), "frame": window.frame(), **cls.target_view(window)}

    @classmethod
    def test_views(cls, recipe: Recipe, sample: Sample) -> dict[str, Any]:
        """The graph of test images; by default the whole image."""
        window = Window.whole(sample, recipe.size_px)
        return {"image": augment.normalise(window.image()), "frame": window.frame(), **cls.target_view(window)}

    @classmethod
    def target_view(cls, window: Window) -> dict[str, Any]:
        """The window of the mask or depth map, where the task reads one."""
        return {}

    @classmethod
    def annotations(cls, dataset: Dataset, ids: np.ndarray) -> dict[int, Any]:
        """What is known of the images besides their views, by id. Raises ConfigError where it is wrong."""
        return {}

    @abstractmethod
    def loss(self, views: Views, known: Sequence[Any]) -> Tensor:
        """This rank's scalar, to be minimised after DDP's mean. known: `annotations` of the batch's images."""

    @abstractmethod
    def judge(self, views: Views, known: Sequence[Any]) -> Any:
        """What a batch of test images adds to the score; numpy or plain data, no larger than it must be."""

    @classmethod
    @abstractmethod
    def score(cls, judged: Sequence[Any]) -> dict[str, float]:
        """The metrics, the most telling first, of all batches of all ranks in the order of their ids."""

    def picture(self, views: Views, known: Sequence[Any]) -> list[Tensor]:
        """What shows how well it does: rows of uint8 images [3, H, W]. No picture by default."""
        return []

    def forward(self, views: Views, known: Sequence[Any]) -> Tensor:
        return self.loss(views, known)

    def train(self, mode: bool = True) -> Network:
        """Layers that do not learn stay as in evaluation, their BatchNorm's statistics too."""
        super().train(mode)
        for module in self.backbone.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()
        return self

    def rate(self, name: str, parameter: nn.Parameter) -> Rate:
        """The head's is the run's; a stage of the backbone has layer_decay times that of the one above it."""
        own = name.removeprefix("backbone.")
        return Rate(self.how.layer_decay ** (1 + self._depth[own]) if own != name else 1.0)


def jitter(recipe: Recipe) -> augment.Augment:
    """Mild colour jitter."""
    strength = recipe.jitter
    return augment.Augment(
        size_px=recipe.size_px,
        jitter=0.8 if strength else 0.0,
        brightness=strength,
        contrast=strength,
        saturation=strength,
        hue_degrees=36 * strength,
    )


def counted_mean(total: Tensor, count: Tensor) -> Tensor:
    """A loss that after DDP's mean is the mean over what all ranks count; total and count are this rank's sums."""
    everywhere = collectives.sum_(count.detach().to(total.dtype))
    return collectives.world_size() * total / everywhere.clamp_min(1)


def unnormalised(images: Tensor) -> Tensor:
    """Views [N, 3, H, W] -> uint8 pictures."""
    return (pixels.rgb(images.float()).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
