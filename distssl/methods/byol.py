"""BYOL: the network predicts, from one view, what a slowly moving copy of itself makes of the other view.

    L = |q(z_a) / |q(z_a)| - z'_b / |z'_b||^2 + the same with the views exchanged = 4 - 2 cos_ab - 2 cos_ba     (eq. 2)
    xi <- tau xi + (1 - tau) theta,    tau = 1 - (1 - tau_base) (1 + cos(pi k / K)) / 2                     (eq. 1, 3.2)

q the predictor, z' the teacher's projection, without gradient; theta the network, xi the teacher, k of K optimiser
steps done.

Jean-Bastien Grill, Florian Strub, Florent Altche, Corentin Tallec, Pierre H. Richemond, Elena Buchatskaya, Carl
Doersch, Bernardo Avila Pires, Zhaohan Daniel Guo, Mohammad Gheshlaghi Azar, Bilal Piot, Koray Kavukcuoglu, Remi Munos,
Michal Valko: Bootstrap Your Own Latent. NeurIPS 2020. https://arxiv.org/abs/2006.07733

Deviation: the last layers of projector and predictor have a bias, which those of the authors' code do not.

The base of tau belongs to the length of the run: the authors' code has 0.97 for 40 epochs, 0.99 for 100 and 300, 0.996
for 1,000.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import nn

from distssl import method
from distssl.data import augment
from distssl.data.augment import Asymmetric
from distssl.nn import heads, losses, teacher
from distssl.nn.teacher import Teacher


class Config(method.Options):
    """The paper's values for ImageNet and a ResNet-50, at 100 or 300 epochs."""

    projector: tuple[PositiveInt, ...] = Field(default=(4096, 256), min_length=1, description="widths after features")
    predictor: PositiveInt = Field(default=4096, description="hidden width")
    momentum: float = Field(default=0.99, ge=0, le=1, description="the teacher's at the start; it ends at 1")
    augment: Asymmetric = Asymmetric()

    small: ClassVar = {"projector": [32, 16], "predictor": 32, "augment": {"size_px": 32}}


class BYOL(method.Method):
    Config = Config

    def build(self) -> None:
        widths = self.cfg.projector
        self.projector = heads.mlp([self.backbone.num_features, *widths])
        self.predictor = heads.mlp([widths[-1], self.cfg.predictor, widths[-1]])
        self.teacher = Teacher(nn.Sequential(self.backbone, self.projector))

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return augment.pair(sample, cfg.augment)

    def loss(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        za, zb = (self.projector(self.backbone(views[name])) for name in "ab")  # [N, D] each
        ta, tb = (self.teacher(views[name]) for name in "ab")
        loss = (
            4 + 2 * losses.negative_cosine(self.predictor(za), tb) + 2 * losses.negative_cosine(self.predictor(zb), ta)
        )
        return {"loss": loss, "embeddings": torch.stack([za, zb]).detach()}

    def on_step_end(self, progress: float) -> None:
        momentum = teacher.momentum(progress, self.cfg.momentum)
        self.teacher.follow(nn.Sequential(self.backbone, self.projector), momentum)
