"""Rotation: which of four turns was the image given?

    L = -1/4 sum_y log F^y(rot90^y(x)),    y in {0, 1, 2, 3} quarter turns                                   (eq. 2, 3)

All four turns of each image are in the batch; they are exact, without interpolation.

Spyros Gidaris, Praveer Singh, Nikos Komodakis: Unsupervised Representation Learning by Predicting Image Rotations.
ICLR 2018. https://arxiv.org/abs/1803.07728

Deviations: AlexNet is torchvision's convolutions without BatchNorm, and the classifier one layer on their pooled
features; the authors' has BatchNorm after every convolution and two hidden layers of 4096.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distssl import method
from distssl.data import augment
from distssl.data.augment import Crop
from distssl.nn import losses

TURNS = 4


class Config(method.Options):
    """The paper's values for ImageNet."""

    augment: Crop = Crop()

    small: ClassVar = {"augment": {"resize_px": 36, "size_px": 32}}


class Rotation(method.Method):
    Config = Config

    def build(self) -> None:
        self.classifier = nn.Linear(self.backbone.num_features, TURNS)

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        image = augment.crop(sample, cfg.augment)
        return {"image": augment.normalise_mirrored(image, sample.draws, cfg.augment.flip)}

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        turned = torch.cat(turns(views["image"]))  # [4N, 3, S, S]
        labels = torch.arange(TURNS, device=turned.device).repeat_interleave(len(views["image"]))
        return losses.classification(self.classifier(self.backbone(turned)), labels)

    def picture(self, views: dict[str, Tensor]) -> list[Tensor]:
        return turns(views["image"])


def turns(images: Tensor) -> list[Tensor]:
    """[N, C, S, S] -> the same turned by 0, 90, 180 and 270 degrees against the clock, as numpy.rot90 does."""
    return [torch.rot90(images, k, dims=(2, 3)) for k in range(TURNS)]
