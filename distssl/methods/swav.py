"""SwAV: from one crop, predict the cluster that another crop of the image was given, clusters being shared equally.

    L = mean over global crops s, other crops t of  -sum_k q_s^k log p_t^k,   p_t = softmax(C z_t / tau)     (eq. 2, 6)

z the normalised projection, C the prototypes (unit rows), q_s the assignment of the global batch's z_s to them by
Sinkhorn's iterations, balanced together with a queue of earlier embeddings.

Mathilde Caron, Ishan Misra, Julien Mairal, Priya Goyal, Piotr Bojanowski, Armand Joulin: Unsupervised Learning of
Visual Features by Contrasting Cluster Assignments. NeurIPS 2020. https://arxiv.org/abs/2006.09882

The queue takes part once it is full, from epoch `queue_from_epoch` on. While prototypes are frozen their gradient is
zero; the published code drops it. To AdamW zeros are gradients too: their first steps after it are up to three times as
large.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from distssl import method
from distssl.data import augment
from distssl.data.augment import LargeCrop, SmallCrop
from distssl.nn import heads, losses, multi_crop, sinkhorn
from distssl.nn.heads import cosines
from distssl.nn.queue import Queue


class Config(method.Options):
    """The paper's values for ImageNet and a ResNet-50."""

    projector: tuple[PositiveInt, ...] = Field(default=(2048, 128), min_length=1, description="widths after features")
    prototypes: PositiveInt = 3000
    temperature: float = Field(default=0.1, gt=0)
    epsilon: float = Field(default=0.05, ge=0.02, description="smoothness of the assignment; float32 holds no less")
    sinkhorn_iterations: PositiveInt = 3
    queue: NonNegativeInt = Field(default=0, description="embeddings; 3840 at batch 256, for small batches")
    queue_from_epoch: NonNegativeInt = 15
    freeze_prototypes_steps: NonNegativeInt = 313
    augment: LargeCrop = LargeCrop()
    num_local: NonNegativeInt = Field(default=6, description="small crops beside the two large ones")
    local: SmallCrop = SmallCrop()

    small: ClassVar = {
        "projector": [32, 16],
        "prototypes": 24,
        "queue": 24,
        "queue_from_epoch": 0,
        "freeze_prototypes_steps": 1,
        "augment": {"size_px": 32},
        "num_local": 2,
        "local": {"size_px": 16},
    }


class SwAV(method.Method):
    Config = Config

    def build(self) -> None:
        dim = self.cfg.projector[-1]
        self.projector = heads.mlp([self.backbone.num_features, *self.cfg.projector])
        self.prototypes = nn.Linear(dim, self.cfg.prototypes, bias=False)
        self._normalise_prototypes()
        self.queues = nn.ModuleList(Queue(self.cfg.queue, dim) for _ in range(2 if self.cfg.queue else 0))

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return augment.multi_crop(sample, cfg.augment, cfg.local, cfg.num_local)

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        z = multi_crop.outputs(lambda x: self.projector(self.backbone(x)), views, self.cfg.num_local)  # [N, D] each
        weight = self.prototypes.weight
        if self.num_steps < self.cfg.freeze_prototypes_steps:
            weight = weight.detach() + 0 * weight
        scores = [cosines(x, weight) for x in z]  # [N, K] each
        unit = [F.normalize(x.detach().to(weight.dtype), dim=1) for x in z[:2]]
        terms = []
        for s in range(2):
            q = self._assign(s, unit[s], scores[s].detach())
            terms += [losses.soft_cross_entropy(scores[t], q, self.cfg.temperature) for t in range(len(z)) if t != s]
        return {"loss": torch.stack(terms).mean(), "embeddings": torch.stack(unit)}

    def _assign(self, crop: int, z: Tensor, scores: Tensor) -> Tensor:
        """The balanced assignment of a global crop's embeddings z [N, D], which then join the queue: [N, K]."""
        more = None
        if self.cfg.queue and self.epoch >= self.cfg.queue_from_epoch:
            queue = self.queues[crop]
            assert isinstance(queue, Queue)
            if queue.num_put >= self.cfg.queue:
                more = cosines(queue.rows, self.prototypes.weight.detach())  # [M, K]
            queue.put(z)
        return sinkhorn.assign(scores, self.cfg.epsilon, self.cfg.sinkhorn_iterations, more)

    def on_step_end(self, progress: float) -> None:
        self._normalise_prototypes()
        for queue in self.queues:
            assert isinstance(queue, Queue)
            queue.turn()

    @torch.no_grad()
    def _normalise_prototypes(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
