"""SimCLR: two augmented views of an image attract, all other views of the batch repel.

    l(i, j) = -log exp(sim(z_i, z_j) / tau) / sum_{k != i} exp(sim(z_i, z_k) / tau)                          (eq. 1)

averaged over all ordered positive pairs (i, j) of the global batch, z the projector's output, sim the cosine.

Ting Chen, Simon Kornblith, Mohammad Norouzi, Geoffrey Hinton: A Simple Framework for Contrastive Learning of Visual
Representations. ICML 2020. https://arxiv.org/abs/2002.05709

The projector ends in a BatchNorm, which the paper does not mention and its code has: without it the embeddings of an
untrained network share a large common part.

Deviations: brightness, contrast, saturation and hue come in this fixed order, not a random one, since one operator
does all four; the blur's window follows the largest sigma instead of being a tenth of the image; solarize (BYOL's, off
by default) can be switched on.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt

from distssl import method
from distssl.data import augment
from distssl.data.augment import Augment
from distssl.nn import contrastive, heads, losses


class Config(method.Options):
    """The paper's values for ImageNet and a ResNet-50."""

    temperature: float = Field(default=0.1, ge=contrastive.LEAST_TEMPERATURE)
    projector: tuple[PositiveInt, ...] = Field(
        default=(2048, 128), min_length=1, description="widths after the features"
    )
    ring: bool = Field(
        default=False, description="pass embeddings from rank to rank, never gather them: for huge batches"
    )
    augment: Augment = Augment()

    small: ClassVar = {"projector": [32, 16], "augment": {"size_px": 32}}


class SimCLR(method.Method):
    Config = Config

    def build(self) -> None:
        self.projector = heads.mlp([self.backbone.num_features, *self.cfg.projector], last_norm=True)

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return augment.pair(sample, cfg.augment)

    def loss(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Both views in one forward, so that BatchNorm's statistics are those of the whole batch of 2B.
        h = self.backbone(torch.cat([views["a"], views["b"]]))  # [2N, features]
        z = self.projector(h)  # [2N, D]
        za, zb = z.chunk(2)  # [N, D] each
        loss = losses.nt_xent(za, zb, self.cfg.temperature, ring=self.cfg.ring)
        return {"loss": loss, "embeddings": torch.stack([za, zb]).detach()}
