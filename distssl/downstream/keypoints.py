"""Keypoints: a heatmap for each point, trained as a distribution over its places.

Heatmaps of a Gaussian around each point: Tompson et al., Joint Training of a Convolutional Network and a Graphical
Model for Human Pose Estimation, NeurIPS 2014, https://arxiv.org/abs/1406.2984. The loss is the cross-entropy of the
heatmap's softmax over places with the Gaussian, over visible points; a point is found at the mean place of the map
around its maximum. Views are not mirrored: that would swap left and right points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from distssl.data.shards import Dataset
from distssl.downstream import frames, labels
from distssl.downstream.labels import Labelled
from distssl.downstream.task import Facts, Network, Recipe, Views, counted_mean, unnormalised
from distssl.errors import ConfigError
from distssl.nn.skip_head import SkipHead

SIGMA = 1.0  # of the Gaussian, in places of the heatmap
AROUND = 2  # places to each side of the maximum
SHARES = (0.05, 0.1)


class Keypoints(Network):
    kind = "keypoints"
    recipe: ClassVar[Recipe] = dataclasses.replace(Recipe(), flip=0.0)

    def build(self) -> None:
        self.head = SkipHead(self.map_channels, self.facts.num_points)

    @classmethod
    def facts_of(cls, data: Labelled, num_classes: int | None) -> Facts:
        return Facts(num_points=labels.num_points(data))

    @classmethod
    def annotations(cls, dataset: Dataset, ids: np.ndarray) -> dict[int, Tensor]:
        return labels.keypoints(dataset, ids)

    def loss(self, views: Views, known: Sequence[Tensor]) -> Tensor:
        logits = self._heatmaps(views)  # [N, P, h, w]
        # Autocast's bf16 has 8 bits: a point at 200.4 would lie at 200, and the loss depend on the machine.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        height, width = logits.shape[2:]
        scale = width / self.how.size_px
        points = torch.stack([_seen(point, frame) for point, frame in zip(known, views["frame"], strict=True)])
        points = points.to(logits)  # [N, P, 3]
        inside = (points[..., :2] >= 0).all(-1) & (points[..., :2] < self.how.size_px).all(-1)
        counts = inside & (points[..., 2] > 0)  # [N, P]
        target = gaussians(points[..., :2] * scale, height, width)
        each = -(target.flatten(2) * logits.flatten(2).log_softmax(-1)).sum(-1)  # [N, P]
        return counted_mean((each * counts).sum(), counts.sum())

    def judge(self, views: Views, known: Sequence[Tensor]) -> list[np.ndarray]:
        """Of each image float32 [P, 5]: the point found and the true one in its pixels, and 1 where that is visible."""
        found = self._found(views).cpu()
        frame = views["frame"].cpu()
        return [
            torch.cat([frames.out_of_view(points, where), true], dim=1).numpy()
            for points, where, true in zip(found, frame, known, strict=True)
        ]

    @classmethod
    def score(cls, judged: Sequence[list[np.ndarray]]) -> dict[str, float]:
        return of_points(np.stack([image for batch in judged for image in batch]))

    def picture(self, views: Views, known: Sequence[Tensor]) -> list[Tensor]:
        from torchvision.utils import draw_keypoints

        rows = []
        for image, found, true, frame in zip(
            unnormalised(views["image"]), self._found(views).cpu(), known, views["frame"].cpu(), strict=True
        ):
            for points in (_seen(true, frame)[true[:, 2] > 0, :2], found):
                rows.append(draw_keypoints(image, points[None], colors="red", radius=2))
        return rows

    def _heatmaps(self, views: Views) -> Tensor:
        return self.head(self.backbone.pyramid(views["image"]))

    def _found(self, views: Views) -> Tensor:
        """The points in the view's pixels, [N, P, 2]."""
        logits = self._heatmaps(views)
        return places(logits.float()) * (self.how.size_px / logits.shape[-1])


def _seen(points: Tensor, frame: Tensor) -> Tensor:
    """Points [P, 3] of an image with x, y in its view."""
    return torch.cat([frames.into_view(points[:, :2], frame.to(points.device)), points[:, 2:]], dim=1)


def gaussians(points: Tensor, height: int, width: int) -> Tensor:
    """Points [N, P, 2] in places -> distributions over places, [N, P, h, w]; place i's middle is at i + 0.5."""
    y, x = (torch.arange(num, device=points.device) + 0.5 for num in (height, width))
    squared = (y[:, None] - points[..., 1, None, None]) ** 2 + (x - points[..., 0, None, None]) ** 2
    return (-squared / (2 * SIGMA**2)).flatten(2).softmax(-1).unflatten(2, (height, width)).to(points.dtype)


def places(logits: Tensor) -> Tensor:
    """Heatmaps [N, P, h, w] -> x, y in places, [N, P, 2]: the mean place within AROUND of the maximum."""
    height, width = logits.shape[2:]
    best = logits.flatten(2).argmax(-1)  # [N, P]
    row, column = best // width, best % width
    y, x = (torch.arange(num, device=logits.device) for num in (height, width))
    near = ((y - row[..., None]).abs() <= AROUND)[..., :, None] & ((x - column[..., None]).abs() <= AROUND)[
        ..., None, :
    ]
    weights = logits.masked_fill(~near, -torch.inf).flatten(2).softmax(-1).unflatten(2, (height, width))
    return torch.stack([(weights.sum(2) * (x + 0.5)).sum(-1), (weights.sum(3) * (y + 0.5)).sum(-1)], dim=-1)


def of_points(images: np.ndarray) -> dict[str, float]:
    """Of float [N, P, 5] as `judge` gives: pck_0.05 and pck_0.1, and mean_error in pixels, over visible points.

    PCK counts a point as found within that share of the longer side of the visible points' bounding box; images with
    fewer than two visible points have none and count for the error alone.
    """
    found, true, visible = images[..., :2], images[..., 2:4], images[..., 4] > 0  # [N, P, 2] twice, [N, P]
    if not visible.any():
        raise ConfigError("eval.test_source: none of its keypoints is visible")
    error = np.linalg.norm(found - true, axis=-1)
    low = np.where(visible[..., None], true, np.inf).min(1)
    high = np.where(visible[..., None], true, -np.inf).max(1)
    extent = np.where(visible.sum(1) > 1, (high - low).max(1), np.nan)[:, None]
    counts = visible & np.isfinite(extent)
    near = {
        f"pck_{share}": float((error <= share * extent)[counts].mean()) if counts.any() else 0.0 for share in SHARES
    }
    return near | {"mean_error": float(error[visible].mean())}
