"""SegSort: a place's embedding is drawn to the segments of its own kind and away from all others.

    L = -mean over places i of  log (sum_{s in C(i)} e_is / (sum_{s in C(i)} e_is + sum_{s of other classes} e_is))
    e_is = exp(kappa v_i . mu_s),    mu_s = sum_{i in s} v_i / |sum_{i in s} v_i|                         (eq. 3, 5, 6)

v_i an embedding of length 1, mu_s the prototypes of the segments of the global batch and, without gradient, of the
latest steps. C(i) are the segments of i's class without i's own, or that alone where it has no other.

Jyh-Jing Hwang, Stella X. Yu, Jianbo Shi, Maxwell D. Collins, Tien-Ju Yang, Xiao Zhang, Liang-Chieh Chen: SegSort:
Segmentation by Discriminative Sorting of Segments. ICCV 2019. https://arxiv.org/abs/1910.06962

`segments: supervised` takes classes from masks: segments are the clusters of each image (spherical k-means on embedding
and location) cut along the classes' borders, and a place of class 255 counts nowhere. `unsupervised` needs none:
segments are superpixels, each a class of its own, so that C(i) is i's own segment.

Deviations: without masks there is a memory too, where the published code has none. Superpixels are k-means on Lab
colour and location (Achanta et al., SLIC, TPAMI 2012), not the paper's contours of a trained edge detector. An image
has at most `most_segments` segments, its largest. Embeddings are made at 1/`stride` of the side by the decoder here, in
place of a dilated network with pyramid pooling.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from distssl import collectives, method
from distssl.data import annotations, augment
from distssl.data.augment import Crop
from distssl.nn import contrastive, decoders, lab, segments
from distssl.nn.precision import full_precision
from distssl.nn.queue import Queue

NUM_CLASSES = 256  # of a mask, at most
NONE, STRANGER = -1, -2  # the class of a prototype that is not there; of one that is nobody's kind


class Config(method.Options):
    """The paper's values for PASCAL VOC."""

    segments: Literal["unsupervised", "supervised"] = Field(
        default="unsupervised", description="superpixels; or clusters within the masks' classes"
    )
    dim: PositiveInt = Field(default=32, description="of an embedding")
    concentration: float = Field(default=10.0, gt=0, le=1 / contrastive.LEAST_TEMPERATURE, description="kappa")
    grid: PositiveInt = Field(default=5, description="k-means starts from grid x grid blocks")
    iterations: PositiveInt = Field(default=10, description="of k-means")
    location: float = Field(default=0.5, ge=0, description="weight of the place in the clustering of embeddings")
    compactness: float = Field(default=20.0, gt=0, description="weight of the place in superpixels, in Lab's units")
    most_segments: PositiveInt = Field(default=48, description="of an image")
    memory: NonNegativeInt = Field(
        default=2048, description="prototypes of earlier steps; with masks the paper has two"
    )
    stride: PositiveInt = Field(default=8, description="pixels of the image to a place of the embedding, each way")
    decoder: tuple[PositiveInt, ...] = Field(default=(256,), min_length=1, description="its widths")
    augment: Crop = Crop()

    @model_validator(mode="after")
    def _whole_places(self) -> Config:
        if self.augment.size_px % self.stride:
            raise ValueError(
                f"stride={self.stride} does not divide augment.size_px={self.augment.size_px}; one that does is right"
            )
        return self

    small: ClassVar = {
        "dim": 8,
        "grid": 3,
        "iterations": 3,
        "most_segments": 9,
        "memory": 200,
        "stride": 4,
        "decoder": [16],
        "augment": {"resize_px": 36, "size_px": 32},
    }


class SegSort(method.Method):
    Config = Config

    def build(self) -> None:
        channels, _, _ = self.backbone.use_maps(self.cfg.augment.size_px)[-1]
        self.decoder = decoders.Decoder(channels, self.cfg.decoder, self.cfg.dim)
        of_cells = self.cfg.grid**2 if self.cfg.segments == "unsupervised" else self.cfg.most_segments
        self.most_segments = min(self.cfg.most_segments, of_cells)  # S
        self.memory = Queue(self.cfg.memory, self.cfg.dim + 1)  # a prototype and its class

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        mirror = sample.draws.coin(cfg.augment.flip)
        if cfg.segments == "unsupervised":
            return {"image": augment.normalise(augment.crop(sample, cfg.augment), mirror)}
        image, mask = augment.crop_with_mask(sample, cfg.augment)
        return {"image": augment.normalise(image, mirror), "mask": augment.flip(mask, mirror)}

    @classmethod
    def reads_masks(cls, cfg: Config) -> bool:
        return cfg.segments == "supervised"

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        image = views["image"]
        v = self.embed(image)  # [N, P, D]
        segment, kind = self._segments(image, v.detach(), views)  # [N, P], [N, S]
        means, _ = segments.means(v, segment, kind.shape[1])
        mu = F.normalize(means, dim=2).flatten(0, 1)  # [N * S, D]
        earlier = self.memory.filled()
        prototypes = torch.cat([collectives.gather(mu), earlier[:, :-1].to(mu.dtype)])  # [M, D]
        kinds = torch.cat([collectives.gather_no_grad(kind.flatten()), earlier[:, -1].long()])  # [M]
        first = (collectives.rank() * len(v) + torch.arange(len(v), device=v.device)) * kind.shape[1]
        own = torch.where(segment >= 0, first[:, None] + segment, NONE).flatten()  # [N * P]
        total, num_places = neighbourhood_loss(v.flatten(0, 1), own, prototypes, kinds, self.cfg.concentration)
        self._remember(mu, kind.flatten())
        of_all = collectives.sum_(num_places)
        return {
            "loss": collectives.world_size() * total / of_all.clamp_min(1),
            "segments": (kind != NONE).sum(1).double().mean(),
        }

    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors of the images' places, row by row: [N, 3, H, W] -> [N, P, D]."""
        side = images.shape[2] // self.cfg.stride
        return F.normalize(self.decoder(self.backbone.feature_map(images), side).flatten(2).mT, dim=2)

    def _segments(self, image: Tensor, v: Tensor, views: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The segment of each place, -1 for none, int64 [N, P]; the class of each segment or NONE, int64 [N, S]."""
        if self.cfg.segments == "supervised":
            return self._clusters(v, views["mask"])
        return self._superpixels(image)

    def _superpixels(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Each a class of its own: its number among all of the global batch."""
        cfg, side = self.cfg, image.shape[2] // self.cfg.stride
        colour = F.adaptive_avg_pool2d(lab.of_normalised(image), side).flatten(2).mT  # [N, P, 3]
        where = segments.locations(side, side, colour).expand(len(image), -1, -1)  # [N, P, 2]
        x = torch.cat([colour, cfg.compactness * cfg.grid / 2 * where], dim=2)
        start = segments.grid(side, side, cfg.grid, image.device)
        found = segments.kmeans(x, start, cfg.grid**2, cfg.iterations, spherical=False)
        found = segments.numbered(found, self.most_segments)
        _, counts = segments.means(colour, found, self.most_segments)  # [N, S]
        number = collectives.rank() * counts.numel() + torch.arange(counts.numel(), device=image.device)
        return found, torch.where(counts > 0, number.view_as(counts), NONE)

    def _clusters(self, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Clusters of the embeddings, cut along the borders of the mask's classes. v: [N, P, D]; mask: [N, 1, H, W]."""
        cfg, side = self.cfg, mask.shape[2] // self.cfg.stride
        label = mask[:, 0, cfg.stride // 2 :: cfg.stride, cfg.stride // 2 :: cfg.stride].flatten(1).long()  # [N, P]
        where = segments.locations(side, side, v).expand(len(v), -1, -1)
        x = F.normalize(torch.cat([v, cfg.location * where], dim=2), dim=2)
        start = segments.grid(side, side, cfg.grid, v.device)
        cluster = segments.kmeans(x, start, cfg.grid**2, cfg.iterations, spherical=True)
        pairs = torch.where(label == annotations.NO_CLASS, -1, cluster * NUM_CLASSES + label)
        found = segments.numbered(pairs, self.most_segments)
        means, counts = segments.means(label[..., None].double(), found, self.most_segments)
        return found, torch.where(counts > 0, means[..., 0].round().long(), NONE)

    def _remember(self, mu: Tensor, kind: Tensor) -> None:
        if self.cfg.segments == "unsupervised":
            kind = torch.where(kind == NONE, NONE, STRANGER)
        dtype = self.memory.rows.dtype
        self.memory.put(torch.cat([mu.detach().to(dtype), kind[:, None].to(dtype)], dim=1))

    def on_step_end(self, progress: float) -> None:
        self.memory.turn()

    def picture(self, views: dict[str, Tensor]) -> list[Tensor]:
        """The image, and its segments in their mean colours."""
        image = views["image"]
        side = image.shape[2] // self.cfg.stride
        segment, _ = self._segments(image, self.embed(image), views)
        colour = F.adaptive_avg_pool2d(image, side).flatten(2).mT  # [N, P, 3]
        means, _ = segments.means(colour, segment, self.most_segments)
        painted = means.gather(1, segment.clamp_min(0)[..., None].expand(-1, -1, 3)).mT.unflatten(2, (side, side))
        return [image, F.interpolate(painted, size=image.shape[2:])]


def neighbourhood_loss(
    v: Tensor, own: Tensor, prototypes: Tensor, kinds: Tensor, concentration: float
) -> tuple[Tensor, Tensor]:
    """The sum of the loss over this rank's places that have a segment, and how many those are (float scalar).

    v: float [n, D], unit. own: int64 [n], the row of each place's own prototype, negative for none. prototypes: float
    [M, D], unit. kinds: int64 [M], their classes. The similarities, and which are near and far, are made tile by tile.
    """
    counted = own >= 0
    v, own = v[counted], own[counted]
    there = kinds != NONE
    _, index, num_alike = kinds.unique(return_inverse=True, return_counts=True)
    alone = num_alike[index[own]] == 1  # [n]: then the own prototype is near, else all others of its class
    kind, number = index.float(), torch.arange(len(kinds), device=kinds.device).float()
    of_place, left_out = kind[own], torch.where(alone, NONE, number[own])  # [n] each
    kind, number = kind[there], number[there]

    def near_and_far(rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        same = contrastive.equal(of_place[rows], kind[columns])
        return same - contrastive.equal(left_out[rows], number[columns]), 1 - same

    total = _negative_log_share(v, prototypes[there], concentration, near_and_far)
    return total, counted.sum().to(total.dtype)


@full_precision
def _negative_log_share(
    v: Tensor, prototypes: Tensor, concentration: float, near_and_far: contrastive.Weights
) -> Tensor:
    """The sum over places of -log of the share that near has in near and far of exp(concentration v . mu)."""
    near, far = contrastive.exp_sums(v, prototypes, 1 / concentration, near_and_far)  # [n] each
    return torch.log1p(far / near).sum().to(v.dtype)
