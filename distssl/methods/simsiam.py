"""SimSiam: the network predicts, from one view, its own projection of the other view, whose gradient is stopped.

    L = D(p_a, stopgrad(z_b)) / 2 + D(p_b, stopgrad(z_a)) / 2,    D(p, z) = -cos(p, z)                        (eq. 4)

z the projection, p the prediction from it.

Xinlei Chen, Kaiming He: Exploring Simple Siamese Representation Learning. CVPR 2021. https://arxiv.org/abs/2011.10566

The predictor's learning rate stays constant (section 4.2). The published code holds the bias before the projector's
last BatchNorm fixed; here a Linear before a norm has none.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import nn

from distssl import method
from distssl.data import augment
from distssl.data.augment import MoCoAugment
from distssl.nn import heads, losses, optim


class Config(method.Options):
    """The paper's values for ImageNet and a ResNet-50."""

    projector: tuple[PositiveInt, ...] = Field(default=(2048, 2048, 2048), min_length=1, description="widths")
    predictor: PositiveInt = Field(default=512, description="hidden width, a bottleneck")
    augment: MoCoAugment = MoCoAugment()

    small: ClassVar = {"projector": [32, 16], "predictor": 8, "augment": {"size_px": 32}}


class SimSiam(method.Method):
    Config = Config

    def build(self) -> None:
        widths = self.cfg.projector
        self.projector = heads.mlp([self.backbone.num_features, *widths], last_norm=True, last_affine=False)
        self.predictor = heads.mlp([widths[-1], self.cfg.predictor, widths[-1]])

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return augment.pair(sample, cfg.augment)

    def loss(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        za, zb = (self.projector(self.backbone(views[name])) for name in "ab")  # [N, D] each
        pa, pb = self.predictor(za), self.predictor(zb)
        za, zb = za.detach(), zb.detach()
        loss = (losses.negative_cosine(pa, zb) + losses.negative_cosine(pb, za)) / 2
        return {"loss": loss, "embeddings": torch.stack([za, zb])}

    def rate(self, name: str, parameter: nn.Parameter) -> optim.Rate:
        return optim.Rate(constant=name.startswith("predictor."))
