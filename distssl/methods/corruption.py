"""Corruption: what was done to the image?

    L = -log softmax(F(x))_y,    x an image after corruption y of K, of a random severity; y = 0 is a clean one

There is no canonical definition of this task, and so no published number. This one takes types in the manner of
ImageNet-C: Dan Hendrycks, Thomas Dietterich: Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations. ICLR 2019. https://arxiv.org/abs/1903.12261 (The other one in use spots artefacts that a network painted:
Simon Jenni, Paolo Favaro, CVPR 2018, https://arxiv.org/abs/1806.05024.)

Shortcuts: every image, the clean ones too, is re-encoded as JPEG at a random quality afterwards, so compression does
not tell; severities are random. Some types are never shown in training: `held_out_auc` says how well the network tells
them from clean images, which it can only by knowing what clean images look like.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from distssl import method
from distssl.data import augment, corruptions
from distssl.data.augment import Crop
from distssl.nn import losses

Held = Literal[
    "gaussian_noise",
    "speckle_noise",
    "impulse_noise",
    "gaussian_blur",
    "box_blur",
    "motion_blur",
    "pixelate",
    "contrast",
    "brightness",
    "saturation",
    "occlusion",
    "posterise",
]


class Config(method.Options):
    held_out: tuple[Held, ...] = Field(
        default=("speckle_noise", "box_blur", "posterise"), description="types never shown in training"
    )
    severity: tuple[float, float] = Field(default=(0.0, 1.0), description="range; 1 is ImageNet-C's strongest level")
    quality: tuple[int, int] = Field(default=(60, 95), description="range of the JPEG that every image goes through")
    augment: Crop = Crop()

    small: ClassVar = {"augment": {"resize_px": 36, "size_px": 32}}

    @property
    def classes(self) -> list[str]:
        """The types of training, clean first."""
        return [name for name in corruptions.TYPES if name not in self.held_out]

    @model_validator(mode="after")
    def _ranges(self) -> Config:
        if not 0 <= self.severity[0] <= self.severity[1] <= 1:
            raise ValueError(f"severity={list(self.severity)}: two numbers of 0 to 1, ascending, are right")
        if not 1 <= self.quality[0] <= self.quality[1] <= 100:
            raise ValueError(f"quality={list(self.quality)}: two numbers of 1 to 100, ascending, are right")
        if len(self.classes) < 2:
            raise ValueError("held_out leaves nothing to tell from clean images; leave out one of its types")
        return self


class Corruption(method.Method):
    Config = Config

    def build(self) -> None:
        self.classifier = nn.Linear(self.backbone.num_features, len(self.cfg.classes))

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        kind = sample.draws.integer(len(cfg.classes))
        image = augment.crop(sample, cfg.augment)
        how = corruptions.strength(sample, cfg.severity, cfg.augment.size_px)
        return {"image": _finished(corruptions.corrupt(image, cfg.classes, kind, how), cfg, sample), "kind": kind}

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        return losses.classification(self.classifier(self.backbone(views["image"])), views["kind"].long())


def exam(cfg: Config, sample: Any) -> dict[str, Any]:
    """The graph of the test: one crop of the image, clean and with each held-out corruption."""
    image = augment.crop(sample, cfg.augment)
    how = corruptions.strength(sample, cfg.severity, cfg.augment.size_px)
    names = ["clean", *cfg.held_out]
    return {name: _finished(corruptions.TYPES[name](image, how), cfg, sample) for name in names}


@torch.no_grad()
def held_out_auc(trained: Corruption, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """How well p(clean) of a trained network tells clean images from each held-out corruption: area under the ROC.

    batches: of `exam`, on the network's device. 0.5 is chance, 1 perfect.
    """
    from sklearn.metrics import roc_auc_score

    training = trained.training
    trained.eval()
    scores: dict[str, list[Tensor]] = {}
    for views in batches:
        for name in ("clean", *trained.cfg.held_out):
            logits = trained.classifier(trained.backbone(views[name]))  # [N, K]
            # log p(clean) in float64: p itself is rounded to 1 for all that are surely clean.
            scores.setdefault(name, []).append(logits.double().log_softmax(1)[:, 0].cpu())
    trained.train(training)
    clean = torch.cat(scores["clean"])
    areas = {}
    for name in trained.cfg.held_out:
        corrupted = torch.cat(scores[name])
        truth = torch.cat([torch.ones_like(clean), torch.zeros_like(corrupted)])
        areas[name] = float(roc_auc_score(truth.numpy(), torch.cat([clean, corrupted]).numpy()))
    return areas


def _finished(image: Any, cfg: Config, sample: Any) -> Any:
    image = corruptions.reencode(image, sample, cfg.quality)
    return augment.normalise_mirrored(image, sample.draws, cfg.augment.flip)
