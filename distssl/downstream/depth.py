"""Depth from a single image: log depth in metres at every pixel.

The loss is the mean absolute error of the log depth over the pixels whose depth is known; metrics as Eigen, Puhrsch,
Fergus, Depth Map Prediction from a Single Image, NeurIPS 2014, https://arxiv.org/abs/1406.2283, section 4.1, over all
pixels of all test images together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distssl.data.windows import Window
from distssl.downstream import labels
from distssl.downstream.labels import Labelled
from distssl.downstream.task import Facts, Network, Views, counted_mean, unnormalised
from distssl.errors import ConfigError
from distssl.nn.skip_head import SkipHead

DELTA = 1.25


class Depth(Network):
    kind = "depth"
    target = "depth"
    pictures_an_image = 3

    def build(self) -> None:
        self.head = SkipHead(self.map_channels, 1)
        self.head.start_from(self.facts.log_depth)

    @classmethod
    def facts_of(cls, data: Labelled, num_classes: int | None) -> Facts:
        return Facts(log_depth=labels.mean_log_depth(data.train, data.train_ids))

    @classmethod
    def target_view(cls, window: Window) -> dict[str, Any]:
        return {"depth": window.depth()}

    def loss(self, views: Views, known: Sequence[Any]) -> Tensor:
        metres = _metres(views)
        there = metres > 0
        error = (self._log_depth(views) - metres.clamp_min(1e-3).log()).abs()
        return counted_mean((error * there).sum(), there.sum())

    def judge(self, views: Views, known: Sequence[Any]) -> np.ndarray:
        metres = _metres(views)
        return sums(self._log_depth(views).exp()[metres > 0], metres[metres > 0])

    @classmethod
    def score(cls, judged: Sequence[np.ndarray]) -> dict[str, float]:
        return of_sums(np.sum(judged, axis=0))

    def picture(self, views: Views, known: Sequence[Any]) -> list[Tensor]:
        metres, predicted = _metres(views).cpu(), self._log_depth(views).exp().cpu()
        rows = []
        for image, true, found in zip(unnormalised(views["image"]), metres, predicted, strict=True):
            near = [(255 * true.max() / depth.clamp_min(true.max() / 255) / 4).clamp(0, 255) for depth in (true, found)]
            rows += [image, *(x.to(torch.uint8).expand(3, -1, -1) for x in near)]
        return rows

    def _log_depth(self, views: Views) -> Tensor:
        x = views["image"]
        return F.interpolate(self.head(self.backbone.pyramid(x)), x.shape[2:], mode="bilinear")[:, 0]  # [N, S, S]


def _metres(views: Views) -> Tensor:
    """[N, S, S], 0 where it is not known."""
    return views["depth"][:, 0].to(views["image"].dtype) / 1000


def sums(predicted: Tensor, true: Tensor) -> np.ndarray:
    """float64 [4] over pixels, [n] each in metres: relative errors, squares, how many within 1.25, their number."""
    predicted, true = predicted.double(), true.double()
    within = torch.maximum(predicted / true, true / predicted) < DELTA
    parts = ((predicted - true).abs() / true).sum(), ((predicted - true) ** 2).sum(), within.sum()
    return np.array([*(float(part) for part in parts), true.numel()])


def of_sums(total: np.ndarray) -> dict[str, float]:
    """abs_rel; rmse in metres; delta_1, the share of pixels whose ratio to the truth is below 1.25."""
    if not total[-1]:
        raise ConfigError("eval.test_source: no pixel of its images has a known depth")
    relative, squared, within, _ = total / total[-1]
    return {"abs_rel": float(relative), "rmse": float(squared**0.5), "delta_1": float(within)}
