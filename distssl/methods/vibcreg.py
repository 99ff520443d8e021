"""VIbCReg: VICReg with correlations for covariances, and embeddings that are whitened.

    L = lambda |Z_a - Z_b|^2 / (N D) + mu (v(Z_a) + v(Z_b)) + nu (c(Z_a) + c(Z_b))
    v(Z) = mean_j max(0, 1 - sqrt(Var(z_j) + 1e-4)),    c(Z) = sum_{i != j} Corr(Z)_ij^2 / D^2

variances and correlations over the global batch; the projector ends in iterative normalisation.

Daesoo Lee, Erlend Aune: Computer Vision Self-supervised Learning Methods on Time Series. 2021.
https://arxiv.org/abs/2109.00783

The variance term is not halved and the correlations are averaged over D^2, as in the published code. Its whitening
matrix is each rank's own; here it is the global batch's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import nn

from distssl import method
from distssl.data import augment
from distssl.data.augment import Asymmetric
from distssl.nn import heads, losses
from distssl.nn.whitening import IterNorm


class Config(method.Options):
    """The published code's values, with its projector for ImageNet-sized images."""

    projector: tuple[PositiveInt, ...] = Field(default=(4096, 4096, 4096), min_length=1, description="widths")
    whitening_groups: PositiveInt = Field(default=64, description="runs of features whitened by themselves")
    invariance: float = Field(default=25.0, ge=0)
    variance: float = Field(default=25.0, ge=0)
    covariance: float = Field(default=200.0, ge=0)
    augment: Asymmetric = Asymmetric()

    small: ClassVar = {"projector": [32, 16], "whitening_groups": 4, "augment": {"size_px": 32}}

    @model_validator(mode="after")
    def _groups_divide(self) -> Config:
        if self.projector[-1] % self.whitening_groups:
            raise ValueError(f"whitening_groups={self.whitening_groups} must divide the last of projector")
        return self


class VIbCReg(method.Method):
    Config = Config

    def build(self) -> None:
        self.projector = nn.Sequential(
            *heads.mlp([self.backbone.num_features, *self.cfg.projector], last_bias=False),
            IterNorm(self.cfg.projector[-1], self.cfg.whitening_groups),
        )

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return augment.pair(sample, cfg.augment)

    def loss(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        za, zb = (self.projector(self.backbone(views[name])) for name in "ab")  # [N, D] each
        loss = losses.vibcreg(za, zb, self.cfg.invariance, self.cfg.variance, self.cfg.covariance)
        return {"loss": loss, "embeddings": torch.stack([za, zb]).detach()}
