"""DeepCluster: which cluster of the network's own features is the image in? Clustered anew before every epoch.

    min over theta, W of  1/N sum_n loss(g_W(f_theta(x_n)), y_n)                                               (eq. 1)
    y_n = argmin over k of |c_k - f(x_n)|^2,   c = k-means of f(x_1) ... f(x_N)                                (eq. 2)

f(x_n) of the middle of each image, whitened by its principal components and of unit length; an epoch draws as many
images of every cluster. Numbers of clusters mean nothing from one epoch to the next, so the classifier g_W starts
again with each.

Mathilde Caron, Piotr Bojanowski, Armand Joulin, Matthijs Douze: Deep Clustering for Unsupervised Learning of Visual
Features. ECCV 2018. https://arxiv.org/abs/1807.05520

Deviations: AlexNet and VGG-16 end in their pooled convolutions, as everywhere here, and the layers after them start
from those, not from all of their places, with a BatchNorm in place of dropout; AlexNet has torchvision's channels and
no BatchNorm between its convolutions, where the published code has wider ones with it. The classifier's optimiser is
the run's, without the momentum of earlier epochs, where the published code makes one without any. Clusters that are too
small give all their samples equally often, where the code draws with replacement. model.sobel=true is the paper's
input.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from distssl import collectives, method
from distssl.data import augment, draws
from distssl.errors import ConfigError, RunError
from distssl.nn import cluster_health, heads, kmeans, losses
from distssl.nn.pca import Whitening
from distssl.nn.per_sample import Embedded, PerSample

_CLASSIFIER, _KMEANS = 0, 1  # keep the seeds apart
DEVIATION = 0.01  # of the classifier's weights at the start of an epoch


class View(augment.Augment):
    """A random resized crop and a flip, all that the paper does."""

    jitter: float = Field(default=0.0, ge=0, le=1)
    grey: float = Field(default=0.0, ge=0, le=1)
    blur: float = Field(default=0.0, ge=0, le=1)


class Config(method.Options):
    """The paper's values for ImageNet and AlexNet."""

    clusters: int = Field(default=10000, ge=2, description="K, of k-means and the classifier")
    hidden: tuple[PositiveInt, ...] = Field(
        default=(4096, 4096),
        description="widths between backbone and classifier; the last, before its ReLU, is clustered",
    )
    components: PositiveInt = Field(default=256, description="principal components that are clustered, at most")
    iterations: PositiveInt = Field(default=20, description="of k-means")
    augment: View = View()

    small: ClassVar = {"clusters": 6, "hidden": [32, 24], "components": 8, "augment": {"size_px": 32}}


class DeepCluster(method.Method):
    Config = Config
    embeds = True
    balances_clusters = True
    seed: Tensor
    centroids: Tensor

    def build(self) -> None:
        widths = [self.backbone.num_features, *self.cfg.hidden]
        self.projector = heads.mlp(widths) if self.cfg.hidden else nn.Identity()
        self.classifier = nn.Linear(widths[-1], self.cfg.clusters)
        components = min(self.cfg.components, widths[-1])
        self.whitening = Whitening(widths[-1], components)
        self.assignments = PerSample(fill=-1, dtype=torch.int64)
        self.register_buffer("centroids", torch.zeros(self.cfg.clusters, components))
        self.register_buffer("seed", torch.randint(2**62, ()))

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return {"image": augment.view(sample, cfg.augment)}

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = self.assignments.values[views["id"]]  # [N]; the order draws samples with a cluster alone
        features = self.embed(views["image"])
        if self.cfg.hidden:
            features = F.relu(features)
        return losses.classification(self.classifier(features), labels)

    def embed(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, D] before the last ReLU."""
        return self.projector(self.backbone(images))

    @torch.no_grad()
    def on_epoch_start(self, epoch: int, features: Embedded | None = None) -> dict[str, float]:
        """Cluster anew. Raises RunError for features that k-means can do nothing with, constant ones among them."""
        assert features is not None
        check_count(features, self.cfg.clusters)
        try:
            left_out = self.whitening.fit(features.x)
            x = F.normalize(self.whitening(features.x), dim=1)  # [n, d]
            found = kmeans.fit(
                x,
                self.cfg.clusters,
                self.cfg.iterations,
                self._seed(epoch, _KMEANS),
                "random",
                ids=features.ids,
                progress=cluster_health.teller(f"epoch {epoch}: k-means"),
            )
        except ValueError as error:
            raise RunError(f"deepcluster cannot cluster the features before epoch {epoch}: {error}") from error
        self.centroids.copy_(found.centroids)
        self.assignments.set(features.ids, found.labels, features.num_samples)
        self._start_classifier(epoch)
        return {
            "clusters/objective": found.objective,
            "clusters/iterations": found.num_iterations,
            "clusters/refilled": found.num_refilled,
            "clusters/components_left_out": left_out,
        }

    def clusters(self) -> Tensor:
        return self.assignments.values

    @property
    def num_clusters(self) -> int:
        return self.cfg.clusters

    def made_anew(self) -> list[nn.Parameter]:
        return list(self.classifier.parameters())

    def _start_classifier(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self._seed(epoch, _CLASSIFIER))
        weight = torch.randn(self.classifier.weight.shape, generator=generator)
        self.classifier.weight.copy_(DEVIATION * weight)
        self.classifier.bias.zero_()

    def _seed(self, epoch: int, word: int) -> int:
        return int(draws.hash64(int(self.seed), epoch, word) >> 1)


def check_count(features: Embedded, k: int) -> None:
    """Raise ConfigError, on every rank, where there are fewer samples than clusters."""
    num = int(collectives.sum_(torch.tensor(len(features.ids), device=features.x.device)))
    if num < k:
        raise ConfigError(f"method.clusters={k} clusters of {num} samples that can be used; at most {num} is right")
