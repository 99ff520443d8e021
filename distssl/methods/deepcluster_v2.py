"""DeepCluster-v2: from each crop of an image, predict the clusters that its image was given before the epoch.

    L = 1/H sum_h  mean over images n and crops t of  -log softmax(C_h z_nt / tau)_{y_hn}
    y_hn = argmax over k of c_hk m_n,   C_h = spherical k-means of the memory m_1 ... m_N, start h

z the normalised projection of a crop, m_n the projection of the image's first large crop when it was seen last. The
centroids are the classifier's weights, fixed for the epoch: so there is nothing to learn anew when clusters change,
which is what DeepCluster needs its new classifiers for.

Mathilde Caron, Ishan Misra, Julien Mairal, Priya Goyal, Piotr Bojanowski, Armand Joulin: Unsupervised Learning of
Visual Features by Contrasting Cluster Assignments. NeurIPS 2020. https://arxiv.org/abs/2006.09882, section 4.1 and
appendix D.1.

Deviations: the memory is one, keyed by sample id and the same on every rank, where the published code has each rank's
own of its own samples, for each of two crops; before the first epoch it is filled with the middle crops, in evaluation
mode. An image that has no cluster takes no part, and the mean is over the global batch's that have one. Empty clusters
are refilled, where they keep a stale centroid there.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from distssl import collectives, method
from distssl.data import augment, draws
from distssl.errors import ConfigError, RunError
from distssl.nn import cluster_health, heads, kmeans
from distssl.nn.per_sample import Embedded, PerSample

NONE = -1


class Large(augment.Augment):
    crop_area: augment.Range = (0.14, 1.0)


class Small(augment.Augment):
    size_px: int = Field(default=96, ge=8)
    crop_area: augment.Range = (0.05, 0.14)


class Config(method.Options):
    """The paper's values for ImageNet and a ResNet-50."""

    projector: tuple[PositiveInt, ...] = Field(default=(2048, 128), min_length=1, description="widths after features")
    clusters: tuple[int, ...] = Field(default=(3000, 3000, 3000), min_length=1, description="K of each clustering")
    iterations: PositiveInt = Field(default=10, description="of k-means")
    temperature: float = Field(default=0.1, gt=0)
    augment: Large = Large()
    num_local: NonNegativeInt = Field(default=6, description="small crops beside the two large ones")
    local: Small = Small()

    small: ClassVar = {
        "projector": [32, 16],
        "clusters": [6, 5],
        "augment": {"size_px": 32},
        "num_local": 2,
        "local": {"size_px": 16},
    }


class DeepClusterV2(method.Method):
    Config = Config
    embeds = True
    seed: Tensor
    prototypes: Tensor

    def build(self) -> None:
        dim, heads_ = self.cfg.projector[-1], len(self.cfg.clusters)
        self.projector = heads.mlp([self.backbone.num_features, *self.cfg.projector])
        self.memory = PerSample(dim, fill=0.0)  # unit rows; zeros: never seen
        self.assignments = PerSample(heads_, fill=NONE, dtype=torch.int64)
        self.register_buffer("prototypes", torch.zeros(sum(self.cfg.clusters), dim))  # all heads', one after the other
        self.register_buffer("seed", torch.randint(2**62, ()))

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return augment.multi_crop(sample, cfg.augment, cfg.local, cfg.num_local)

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        large = torch.cat([views["a"], views["b"]])  # [2N, 3, H, W]
        z = list(self.embed(large).chunk(2))  # [N, D] each
        if self.cfg.num_local:
            small = torch.cat([views[f"local{i}"] for i in range(self.cfg.num_local)])
            z += self.embed(small).chunk(self.cfg.num_local)
        with torch.autocast(z[0].device.type, enabled=False):
            loss, accuracy = self._predict(torch.stack(z), views["id"])
        self.memory.put(views["id"], z[0])
        return {"loss": loss, "accuracy": accuracy, "embeddings": torch.stack(z[:2]).detach()}

    def _predict(self, z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """z [V, N, D] -> the mean over heads, crops and the global batch's images that have clusters, and accuracy."""
        labels = self.assignments.values[ids]  # [N, H]
        known = (labels[:, 0] != NONE).to(z.dtype)  # [N]
        weights = known / (collectives.sum_(known.sum()) / collectives.world_size()).clamp_min(1.0)
        scores = (z @ self.prototypes.T / self.cfg.temperature).split(self.cfg.clusters, dim=2)  # H of [V, N, K]
        losses, hits = [], []
        for of_head, label in zip(scores, labels.clamp_min(0).T, strict=True):
            logs = F.log_softmax(of_head, dim=2).gather(2, label.expand(len(z), -1)[..., None])[..., 0]  # [V, N]
            losses.append(-(logs * weights).sum(1).mean())
            hits.append(((of_head.argmax(2) == label) * weights).sum(1).mean())
        return torch.stack(losses).mean(), torch.stack(hits).mean().detach()

    def embed(self, images: Tensor) -> Tensor:
        z = self.projector(self.backbone(images))
        return F.normalize(z.to(self.prototypes.dtype), dim=1)

    def on_step_end(self, progress: float) -> None:
        self.memory.turn()

    def wants_features(self, epoch: int) -> bool:
        """For a memory to start with; later on the steps fill it."""
        return epoch == 0

    @torch.no_grad()
    def on_epoch_start(self, epoch: int, features: Embedded | None = None) -> dict[str, float]:
        """Cluster the memory, every head from a start of its own. Raises RunError where k-means cannot."""
        if features is not None:
            self.memory.set(features.ids, features.x, features.num_samples)
        memory = self.memory.values
        seen = memory.any(1).nonzero()[:, 0]
        if len(seen) < max(self.cfg.clusters):
            raise ConfigError(
                f"method.clusters={list(self.cfg.clusters)}: of {len(seen)} samples that can be used; "
                f"at most {len(seen)} each is right"
            )
        rows = memory[seen]
        if (rows.amax(0) - rows.amin(0)).max() <= 8 * torch.finfo(rows.dtype).eps:
            raise RunError(f"deepcluster_v2 cannot cluster its memory before epoch {epoch}: constant features")
        x, mine = (of_all.tensor_split(collectives.world_size())[collectives.rank()] for of_all in (rows, seen))
        found = [self._cluster(x, mine, head, epoch) for head in range(len(self.cfg.clusters))]
        self.prototypes.copy_(torch.cat([of_head.centroids for of_head in found]))
        self.assignments.set(mine, torch.stack([of_head.labels for of_head in found], dim=1), len(memory))
        return {
            "clusters/objective": float(np.mean([of_head.objective for of_head in found])),
            "clusters/refilled": float(sum(of_head.num_refilled for of_head in found)),
        }

    def _cluster(self, x: Tensor, ids: Tensor, head: int, epoch: int) -> kmeans.KMeans:
        seed = int(draws.hash64(int(self.seed), epoch, head) >> 1)
        try:
            return kmeans.fit(
                x,
                self.cfg.clusters[head],
                self.cfg.iterations,
                seed,
                "random",
                ids=ids,
                spherical=True,
                progress=cluster_health.teller(f"epoch {epoch}: k-means {head}"),
            )
        except ValueError as error:
            raise RunError(f"deepcluster_v2 cannot cluster its memory before epoch {epoch}: {error}") from error

    def clusters(self) -> Tensor:
        """The first head's."""
        return self.assignments.values[:, 0]

    @property
    def num_clusters(self) -> int:
        return self.cfg.clusters[0]
