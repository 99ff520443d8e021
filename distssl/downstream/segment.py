"""Semantic segmentation: the class of every pixel, by a fully convolutional head on the backbone's feature maps."""

from __future__ import annotations

import colorsys
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

IGNORED = 255  # the class of a pixel that has none


class Segment(Network):
    kind = "mask"
    target = "mask"

    def build(self) -> None:
        self.head = SkipHead(self.map_channels, self.facts.num_classes)

    @classmethod
    def facts_of(cls, data: Labelled, num_classes: int | None) -> Facts:
        found = labels.num_classes(data, cls.kind, num_classes)
        if found < 2:
            raise ConfigError(
                "eval.source: its masks have class 0 alone (255 is none); two classes from 0 on are right"
            )
        return Facts(num_classes=found)

    @classmethod
    def target_view(cls, window: Window) -> dict[str, Any]:
        return {"mask": window.classes()}

    def loss(self, views: Views, known: Sequence[Any]) -> Tensor:
        mask = _mask(views)
        total = F.cross_entropy(self._logits(views), mask, ignore_index=IGNORED, reduction="sum")
        return counted_mean(total, (mask != IGNORED).sum())

    def judge(self, views: Views, known: Sequence[Any]) -> np.ndarray:
        mask = _mask(views)
        return confusion(self._logits(views).argmax(1), mask, self.facts.num_classes).cpu().numpy()

    @classmethod
    def score(cls, judged: Sequence[np.ndarray]) -> dict[str, float]:
        return of_confusion(np.sum(judged, axis=0))

    def picture(self, views: Views, known: Sequence[Any]) -> list[Tensor]:
        from torchvision.utils import draw_segmentation_masks

        predicted = self._logits(views).argmax(1).cpu()
        rows = []
        for image, found, true in zip(unnormalised(views["image"]), predicted, _mask(views).cpu(), strict=True):
            for classes in (true, found):
                each = torch.stack([classes == k for k in range(1, self.facts.num_classes)])
                rows.append(draw_segmentation_masks(image, each, alpha=0.5, colors=colours(len(each))))
        return rows

    def _logits(self, views: Views) -> Tensor:
        x = views["image"]
        return F.interpolate(self.head(self.backbone.pyramid(x)), x.shape[2:], mode="bilinear")  # [N, K, S, S]


def _mask(views: Views) -> Tensor:
    """int64 [N, S, S]."""
    return views["mask"][:, 0].long()


def colours(num: int) -> list[str | tuple[int, int, int]]:
    """Colours that are far apart: the hue turns by the golden ratio from class to class."""
    hues = (0.618034 * k % 1 for k in range(num))
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 1, 1)) for hue in hues]  # pyright: ignore[reportReturnType]


def confusion(predicted: Tensor, true: Tensor, num_classes: int) -> Tensor:
    """int64 [K, K]: pixels by true class (row) and predicted class (column), without those that have no class."""
    counts = true != IGNORED
    return torch.bincount(true[counts] * num_classes + predicted[counts], minlength=num_classes**2).reshape(
        num_classes, num_classes
    )


def of_confusion(counts: np.ndarray) -> dict[str, float]:
    """miou and f1, means over the classes that occur in truth or prediction, and pixel accuracy; counts: [K, K]."""
    if not counts.sum():
        raise ConfigError("eval.test_source: no pixel of its masks has a class")
    right, truth, predicted = np.diag(counts), counts.sum(1), counts.sum(0)
    occurs = truth + predicted > 0
    iou = right[occurs] / (truth + predicted - right)[occurs]
    f1 = 2 * right[occurs] / (truth + predicted)[occurs]
    return {"miou": float(iou.mean()), "pixel_accuracy": float(right.sum() / counts.sum()), "f1": float(f1.mean())}
