"""MoCo v3: contrast within the batch against a slow teacher's keys, from both views, through a predictor.

    L = 2 tau (l(q_a, k_b) + l(q_b, k_a)),    l(q, k) = -log exp(q k+ / tau) / sum_{k in batch} exp(q k / tau)  (alg. 1)

q the prediction from a view, k+ the teacher's projection of the image's other view, k those of the global batch.

Xinlei Chen, Saining Xie, Kaiming He: An Empirical Study of Training Self-Supervised Vision Transformers. ICCV 2021.
https://arxiv.org/abs/2104.02057
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import nn

from distssl import collectives, method
from distssl.data import augment
from distssl.data.augment import Asymmetric
from distssl.nn import contrastive, heads, losses, teacher
from distssl.nn.teacher import Teacher


class Views(Asymmetric):
    crop_area: augment.Range = (0.2, 1.0)


class Config(method.Options):
    """The paper's values for ImageNet and a ResNet-50.

    A ViT has temperature 0.2, a projector of three layers and predictor_norm.
    """

    projector: tuple[PositiveInt, ...] = Field(default=(4096, 256), min_length=1, description="widths after features")
    predictor: PositiveInt = Field(default=4096, description="hidden width")
    predictor_norm: bool = Field(default=False, description="a BatchNorm after its last layer")
    temperature: float = Field(default=1.0, ge=contrastive.LEAST_TEMPERATURE)
    momentum: float = Field(default=0.99, ge=0, le=1, description="the teacher's at the start; it ends at 1")
    augment: Views = Views()

    small: ClassVar = {"projector": [32, 16], "predictor": 32, "augment": {"size_px": 32}}


class MoCoV3(method.Method):
    Config = Config

    def build(self) -> None:
        widths = self.cfg.projector
        self.projector = heads.mlp([self.backbone.num_features, *widths], last_norm=True, last_affine=False)
        self.predictor = heads.mlp(
            [widths[-1], self.cfg.predictor, widths[-1]],
            last_norm=self.cfg.predictor_norm,
            last_affine=False,
            last_bias=False,
        )
        self.teacher = Teacher(nn.Sequential(self.backbone, self.projector))

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return augment.pair(sample, cfg.augment)

    def loss(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        qa, qb = (self.predictor(self.projector(self.backbone(views[name]))) for name in "ab")  # [N, D] each
        ka, kb = (collectives.gather_no_grad(self.teacher(views[name])) for name in "ab")  # [B, D] each
        temperature = self.cfg.temperature
        loss = 2 * temperature * (losses.in_batch(qa, kb, temperature) + losses.in_batch(qb, ka, temperature))
        return {"loss": loss, "embeddings": torch.stack([qa, qb]).detach()}

    def on_step_end(self, progress: float) -> None:
        momentum = teacher.momentum(progress, self.cfg.momentum)
        self.teacher.follow(nn.Sequential(self.backbone, self.projector), momentum)
