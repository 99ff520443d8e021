"""Barlow Twins: the cross-correlation of two views' features, over the batch, is drawn to the identity.

    L = sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2                                                (eq. 1, 2)

C_ij the correlation, over the global batch, of feature i of one view's embedding with feature j of the other's.

Jure Zbontar, Li Jing, Ishan Misra, Yann LeCun, Stephane Deny: Barlow Twins: Self-Supervised Learning via Redundancy
Reduction. ICML 2021. https://arxiv.org/abs/2103.03230

The published code sums C over W GPUs by a collective without gradient, so its gradient is 1/W of this one.
`official_num_gpus` gives the loss that scale, whatever this run's number of workers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import nn

from distssl import method
from distssl.data import augment
from distssl.data.augment import Asymmetric
from distssl.nn import heads, losses, optim


class Config(method.Options):
    """The paper's values for ImageNet and a ResNet-50."""

    projector: tuple[PositiveInt, ...] = Field(default=(8192, 8192, 8192), min_length=1, description="widths")
    off_diagonal: float = Field(default=0.0051, ge=0, description="the paper's lambda")
    lr_scale_of_biases: float = Field(
        default=0.0048 / 0.2, gt=0, description="learning rate of biases and norms over that of weights"
    )
    official_num_gpus: PositiveInt = Field(default=1, description="1: the exact gradient; else that over as many")
    augment: Asymmetric = Asymmetric()

    small: ClassVar = {"projector": [32, 16], "augment": {"size_px": 32}}


class BarlowTwins(method.Method):
    Config = Config

    def build(self) -> None:
        self.projector = heads.mlp([self.backbone.num_features, *self.cfg.projector], last_bias=False)

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return augment.pair(sample, cfg.augment)

    def loss(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        za, zb = (self.projector(self.backbone(views[name])) for name in "ab")  # [N, D] each
        loss = losses.barlow_twins(za, zb, self.cfg.off_diagonal) / self.cfg.official_num_gpus
        return {"loss": loss, "embeddings": torch.stack([za, zb]).detach()}

    def rate(self, name: str, parameter: nn.Parameter) -> optim.Rate:
        return optim.Rate(scale=self.cfg.lr_scale_of_biases if parameter.ndim == 1 else 1.0)
