"""MoCo v2: a view finds its image's other view, as a slow teacher sees it, among a long queue of earlier ones.

    L_q = -log exp(q k+ / tau) / (exp(q k+ / tau) + sum_{k in queue} exp(q k / tau))                           (eq. 1)
    theta_k <- m theta_k + (1 - m) theta_q                                                                     (eq. 2)

q the query, k+ the teacher's key of the other view; the queue holds the keys of the latest global batches.

Kaiming He, Haoqi Fan, Yuxin Wu, Saining Xie, Ross Girshick: Momentum Contrast for Unsupervised Visual Representation
Learning. CVPR 2020. https://arxiv.org/abs/1911.05722
Xinlei Chen, Haoqi Fan, Ross Girshick, Kaiming He: Improved Baselines with Momentum Contrastive Learning. 2020.
https://arxiv.org/abs/2003.04297

Deviation: BatchNorm's statistics are the global batch's, for queries and for keys, where the authors give each GPU its
own and shuffle the keys among them, so that a query cannot recognise its key by common statistics. Here it might, for
the queue's keys have the statistics of earlier batches; the more images a batch has, the less that tells. Statistics of
a share of the batch would depend on how it is shared out.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import nn

from distssl import method
from distssl.data import augment
from distssl.data.augment import MoCoAugment
from distssl.nn import contrastive, heads, losses
from distssl.nn.queue import Queue
from distssl.nn.teacher import Teacher


class Config(method.Options):
    """The paper's values for ImageNet and a ResNet-50."""

    projector: tuple[PositiveInt, ...] = Field(default=(2048, 128), min_length=1, description="widths after features")
    temperature: float = Field(default=0.2, ge=contrastive.LEAST_TEMPERATURE)
    momentum: float = Field(default=0.999, ge=0, le=1)
    queue: PositiveInt = Field(default=65536, description="keys; random ones at the start")
    augment: MoCoAugment = MoCoAugment()

    small: ClassVar = {"projector": [32, 16], "queue": 40, "augment": {"size_px": 32}}


class MoCoV2(method.Method):
    Config = Config

    def build(self) -> None:
        self.projector = heads.mlp([self.backbone.num_features, *self.cfg.projector], norm=False)
        self.teacher = Teacher(nn.Sequential(self.backbone, self.projector))
        self.queue = Queue(self.cfg.queue, self.cfg.projector[-1])
        self.queue.fill()

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return augment.pair(sample, cfg.augment)

    def loss(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        queries = self.projector(self.backbone(views["a"]))  # [N, D]
        keys = F.normalize(self.teacher(views["b"]).to(self.queue.rows.dtype), dim=1)  # [N, D]
        loss = losses.info_nce(queries, keys, self.queue.rows, self.cfg.temperature)
        self.queue.put(keys)
        return {"loss": loss, "embeddings": torch.stack([queries.detach().to(keys.dtype), keys])}

    def on_step_end(self, progress: float) -> None:
        self.teacher.follow(nn.Sequential(self.backbone, self.projector), self.cfg.momentum)
        self.queue.turn()
