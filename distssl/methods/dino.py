"""DINO: a student's distribution over outputs, from any crop, follows a slow teacher's, from another large crop.

    L = mean over large crops x, crops x' != x of  -sum_k P_t(x)^k log P_s(x')^k                                (eq. 3)
    P_s = softmax(g_s / tau_s),    P_t = softmax((g_t - c) / tau_t)
    c <- m c + (1 - m) mean of g_t over the global batch and both large crops                                    (eq. 4)

g the outputs of the student's head and of the teacher's, which is the student's moving average.

Mathilde Caron, Hugo Touvron, Ishan Misra, Herve Jegou, Julien Mairal, Piotr Bojanowski, Armand Joulin: Emerging
Properties in Self-Supervised Vision Transformers. ICCV 2021. https://arxiv.org/abs/2104.14294

What is evaluated is the teacher, as in the paper. A timm ViT takes the small crops with
model.options={dynamic_img_size: true}. `teacher_entropy` of the log is that of P_t, over log K: near 1 the teacher
tells nothing apart, and a lower `teacher_temperature` is wanted.

Deviations. While the last layer is frozen its gradient is zero, where the published code drops it; the optimiser
forgets those steps. Its rows are unit vectors, as by default there. The published weight decay grows from 0.04 to 0.4;
here it is the run's, constant. train.clip_norm is of the whole gradient, where that code clips each parameter's.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from distssl import collectives, method
from distssl.data import augment
from distssl.data.augment import Asymmetric, SmallCrop
from distssl.nn import backbones, losses, multi_crop, teacher
from distssl.nn.heads import cosines
from distssl.nn.teacher import Teacher


class Large(Asymmetric):
    crop_area: augment.Range = (0.4, 1.0)


class Small(SmallCrop):
    crop_area: augment.Range = (0.05, 0.4)
    brightness: float = Field(default=0.4, ge=0, le=1)
    contrast: float = Field(default=0.4, ge=0, le=1)
    saturation: float = Field(default=0.2, ge=0, le=1)
    hue_degrees: float = Field(default=36.0, ge=0, le=180)


class Config(method.Options):
    """The paper's values for ImageNet and a ViT-S/16."""

    hidden: PositiveInt = Field(default=2048, description="width of the head's hidden layers")
    bottleneck: PositiveInt = 256
    outputs: int = Field(default=65536, ge=2)
    student_temperature: float = Field(default=0.1, gt=0)
    teacher_temperature: float = Field(default=0.07, gt=0)
    warmup_teacher_temperature: float = Field(default=0.04, gt=0, description="at the start")
    warmup_epochs: NonNegativeInt = Field(default=30, description="of the teacher's temperature")
    momentum: float = Field(default=0.996, ge=0, le=1, description="the teacher's at the start; it ends at 1")
    centre_momentum: float = Field(default=0.9, ge=0, le=1)
    freeze_last_layer_epochs: NonNegativeInt = 1
    augment: Large = Large()
    num_local: NonNegativeInt = Field(default=8, description="small crops beside the two large ones")
    local: Small = Small()

    small: ClassVar = {
        "hidden": 32,
        "bottleneck": 16,
        "outputs": 24,
        "freeze_last_layer_epochs": 0,
        "augment": {"size_px": 32},
        "num_local": 2,
        "local": {"size_px": 16},
    }


class Head(nn.Module):
    """[N, in_dim] -> [N, outputs]: an MLP with a bottleneck, whose output is normalised, then unit prototypes."""

    def __init__(self, in_dim: int, hidden: int, bottleneck: int, outputs: int) -> None:
        super().__init__()
        widths = [in_dim, hidden, hidden]
        layers = [layer for i in range(2) for layer in (nn.Linear(widths[i], widths[i + 1]), nn.GELU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = nn.Linear(bottleneck, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.mlp(x))

    def scores(self, z: Tensor, frozen: bool = False) -> Tensor:
        """The prototypes' of the bottleneck z. frozen: the last layer gets a gradient of zero."""
        weight = self.last.weight.detach() + 0 * self.last.weight if frozen else self.last.weight
        return cosines(z, F.normalize(weight, dim=1))


class DINO(method.Method):
    Config = Config

    centre: Tensor

    def build(self) -> None:
        cfg = self.cfg
        self.head = Head(self.backbone.num_features, cfg.hidden, cfg.bottleneck, cfg.outputs)
        self.teacher = Teacher(nn.Sequential(self.backbone, self.head))
        self.register_buffer("centre", torch.zeros(cfg.outputs))
        self._means: list[Tensor] = []  # of the teacher's outputs, a global batch each, since the last optimiser step

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return augment.multi_crop(sample, cfg.augment, cfg.local, cfg.num_local)

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        frozen = self.epoch < self.cfg.freeze_last_layer_epochs
        features = multi_crop.outputs(self.backbone, views, self.cfg.num_local)  # [N, features] each
        z = self.head.mlp(torch.cat(features))  # [crops N, bottleneck]
        student = self.head.scores(z, frozen).chunk(len(features))  # [N, K] each
        outputs = self.teacher(torch.cat([views["a"], views["b"]])).to(self.centre.dtype)  # [2N, K]
        self._means.append(collectives.sum_(outputs.mean(0)) / collectives.world_size())
        terms, entropies = [], []
        for crop, of_teacher in enumerate(outputs.chunk(2)):
            p = ((of_teacher - self.centre) / self.temperature()).softmax(1)  # [N, K]
            entropies.append(torch.special.entr(p).sum(1).mean() / math.log(p.shape[1]))
            terms += [
                losses.soft_cross_entropy(of_student, p, self.cfg.student_temperature)
                for other, of_student in enumerate(student)
                if other != crop
            ]
        return {
            "loss": torch.stack(terms).mean(),
            "embeddings": torch.stack(z.chunk(len(features))[:2]).detach(),
            "teacher_entropy": torch.stack(entropies).mean(),
        }

    def temperature(self) -> float:
        """The teacher's: a linear warm-up over epochs."""
        cfg = self.cfg
        share = min(1.0, self.epoch / max(1, cfg.warmup_epochs - 1)) if cfg.warmup_epochs else 1.0
        return cfg.warmup_teacher_temperature + share * (cfg.teacher_temperature - cfg.warmup_teacher_temperature)

    def made_anew(self) -> list[nn.Parameter]:
        """The last layer when it is no longer frozen: AdamW's moments of zero gradients would make its steps larger."""
        return list(self.head.last.parameters()) if self.epoch == self.cfg.freeze_last_layer_epochs > 0 else []

    def on_step_end(self, progress: float) -> None:
        self.teacher.follow(nn.Sequential(self.backbone, self.head), teacher.momentum(progress, self.cfg.momentum))
        self.centre.lerp_(torch.stack(self._means).mean(0), 1 - self.cfg.centre_momentum)
        self._means.clear()

    def evaluated(self) -> backbones.Backbone:
        return self.teacher.net.get_submodule("0")  # pyright: ignore[reportReturnType]
