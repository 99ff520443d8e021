"""Classification by the whole network: a linear layer on the backbone, which learns with it, lower layers more slowly.

Layer-wise rates: Howard and Ruder, Universal Language Model Fine-tuning, ACL 2018, https://arxiv.org/abs/1801.06146,
section 3.2; Clark et al., ELECTRA, ICLR 2020, https://arxiv.org/abs/2003.10555, appendix A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from distssl.data import augment
from distssl.data.sample import Sample
from distssl.downstream import classify, labels
from distssl.downstream.labels import Labelled
from distssl.downstream.task import Facts, Network, Recipe, Views, jitter


class Finetune(Network):
    kind = labels.LABEL
    uses_pyramid = False

    def build(self) -> None:
        self.head = nn.Linear(self.backbone.num_features, self.facts.num_classes)

    @classmethod
    def facts_of(cls, data: Labelled, num_classes: int | None) -> Facts:
        return Facts(num_classes=len(data.train.classes))

    @classmethod
    def views(cls, recipe: Recipe, sample: Sample) -> dict[str, Any]:
        area = recipe.window[0] ** 2, recipe.window[1] ** 2
        image = augment.random_resized_crop(sample, recipe.size_px, area, (3 / 4, 4 / 3))
        image = augment.colour_jitter(image, sample.draws, jitter(recipe))
        return {"image": augment.normalise(image, mirror=sample.draws.coin(recipe.flip))}

    @classmethod
    def test_views(cls, recipe: Recipe, sample: Sample) -> dict[str, Any]:
        image = augment.centre_crop(sample, recipe.size_px, round(recipe.size_px / recipe.crop))
        return {"image": augment.normalise(image)}

    def loss(self, views: Views, known: Sequence[Any]) -> Tensor:
        return F.cross_entropy(self._logits(views), views["label"])

    def judge(self, views: Views, known: Sequence[Any]) -> np.ndarray:
        return np.stack([self._logits(views).argmax(1).cpu().numpy(), views["label"].cpu().numpy()])  # [2, n]

    @classmethod
    def score(cls, judged: Sequence[np.ndarray]) -> dict[str, float]:
        return classify.accuracies(*np.concatenate(judged, axis=1))

    def _logits(self, views: Views) -> Tensor:
        return self.head(self.backbone(views["image"]))  # [N, K]
