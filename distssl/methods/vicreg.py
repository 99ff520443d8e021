"""VICReg: views lie together, every feature keeps its spread over the batch, and no two features say the same.

    L = lambda |Z_a - Z_b|^2 / (N D) + mu (v(Z_a) + v(Z_b)) / 2 + nu (c(Z_a) + c(Z_b))                     (eq. 6)
    v(Z) = mean_j max(0, 1 - sqrt(Var(z_j) + 1e-4)),    c(Z) = sum_{i != j} Cov(Z)_ij^2 / D             (eq. 1 to 4)

variances and covariances over the global batch.

Adrien Bardes, Jean Ponce, Yann LeCun: VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised
Learning. ICLR 2022. https://arxiv.org/abs/2105.04906

The halved variance term is the published code's, whose numbers are cited; the paper's equation sums it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt

from distssl import method
from distssl.data import augment
from distssl.data.augment import Asymmetric
from distssl.nn import heads, losses


class Config(method.Options):
    """The paper's values for ImageNet and a ResNet-50."""

    projector: tuple[PositiveInt, ...] = Field(default=(8192, 8192, 8192), min_length=1, description="widths")
    invariance: float = Field(default=25.0, ge=0)
    variance: float = Field(default=25.0, ge=0)
    covariance: float = Field(default=1.0, ge=0)
    augment: Asymmetric = Asymmetric()

    small: ClassVar = {"projector": [32, 16], "augment": {"size_px": 32}}


class VICReg(method.Method):
    Config = Config

    def build(self) -> None:
        self.projector = heads.mlp([self.backbone.num_features, *self.cfg.projector], last_bias=False)

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return augment.pair(sample, cfg.augment)

    def loss(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        za, zb = (self.projector(self.backbone(views[name])) for name in "ab")  # [N, D] each
        loss = losses.vicreg(za, zb, self.cfg.invariance, self.cfg.variance, self.cfg.covariance)
        return {"loss": loss, "embeddings": torch.stack([za, zb]).detach()}
