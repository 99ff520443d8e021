"""UDA: few labels by cross-entropy, and on images without labels the same answer before and after strong augmentation.

    L = mean over x of [p(y|x) <= eta_t] CE(p(.|x), y)
      + lambda mean over u of [max p(.|u) > beta] KL(sg softmax(f(u) / T) | p(.|aug(u)))                  (eq. 1, 3.2)
    eta_t = 1/K + alpha_t (1 - 1/K),    alpha_t = t, exp(5 (t - 1)) or 1 - exp(-5 t)                            (3.1)

x labelled, u unlabelled images; f logits; t the share of the run that is done. The first mean is over the labelled
images that the threshold leaves, the second over all unlabelled ones of the global batch.

Qizhe Xie, Zihang Dai, Eduard Hovy, Minh-Thang Luong, Quoc V. Le: Unsupervised Data Augmentation for Consistency
Training. NeurIPS 2020. https://arxiv.org/abs/1904.12848

As in the published code, the confidence is of the probabilities before sharpening, the temperature is the target's
alone, and all images go through the network in one batch, so that BatchNorm sees them together.

Deviations: the crop comes before RandAugment and not after it, and is of an enlarged image, not of one padded by
reflection. Every operation that is drawn is applied, where the published code applies half of them, and Invert is not
among them. What is evaluated are the parameters themselves, not their moving average; the optimiser is the run's, whose
SGD has no Nesterov momentum, and the rate falls to zero by half a cosine, not by 7/16 of one.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distssl import collectives, method
from distssl.data import augment, randaugment
from distssl.data.augment import Crop
from distssl.data.randaugment import RandAugment
from distssl.errors import ConfigError
from distssl.nn.precision import full_precision


class Config(method.Options):
    """The published code's values for CIFAR-10."""

    num_classes: int = Field(default=10, ge=2)
    temperature: float = Field(default=0.4, gt=0, description="of the target; below 1 sharpens it")
    confidence: float = Field(default=0.8, ge=0, le=1, description="unlabelled images below it do not count; beta")
    signal: Literal["linear", "exp", "log", "none"] = Field(
        default="linear", description="how the bound on labelled images' certainty rises; none: no bound"
    )
    weight: float = Field(default=1.0, ge=0, description="of the consistency")
    augment: Crop = Crop(resize_px=36, size_px=32)
    strong: RandAugment = RandAugment()

    small: ClassVar = {"num_classes": 4, "confidence": 0.2, "augment": {"resize_px": 36, "size_px": 32}}


class UDA(method.Method):
    Config = Config
    learns_from_labels = True

    def build(self) -> None:
        self.classifier = nn.Linear(self.backbone.num_features, self.cfg.num_classes)

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        sample = sample.decoded()
        weak = augment.crop(sample, cfg.augment)
        strong = randaugment.view(augment.crop(sample, cfg.augment), sample, cfg.strong, cfg.augment.size_px)
        crops = {"weak": weak, "strong": strong}
        return {
            name: augment.normalise_mirrored(image, sample.draws, cfg.augment.flip) for name, image in crops.items()
        }

    @classmethod
    def labelled_views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        return {"image": augment.normalise_mirrored(augment.crop(sample, cfg.augment), sample.draws, cfg.augment.flip)}

    @classmethod
    def check_labels(cls, cfg: Config, num_classes: int) -> None:
        if num_classes > cfg.num_classes:
            raise ConfigError(
                f"method.num_classes={cfg.num_classes}: the labelled images have {num_classes} classes; "
                f"{num_classes} is right"
            )

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = views["labelled.label"].to(views["weak"].device)
        batch = torch.cat([views["labelled.image"], views["weak"], views["strong"]])
        logits = self.classifier(self.backbone(batch))
        x, weak, strong = logits.split([len(labels), len(views["weak"]), len(views["strong"])])
        supervised, num_used = annealed_cross_entropy(x, labels, threshold(self.cfg, self.progress))
        consistency, share = consistent(weak, strong, self.cfg.temperature, self.cfg.confidence)
        return {
            "loss": supervised + self.cfg.weight * consistency,
            "supervised": supervised,
            "consistency": consistency,
            "num_labels_used": num_used,
            "confident": share,
            "accuracy": (x.argmax(1) == labels).double().mean(),
        }


def threshold(cfg: Config, progress: float) -> float:
    """The certainty up to which a labelled image still counts, progress the share of the run that is done."""
    rising = {
        "linear": lambda t: t,
        "exp": lambda t: math.exp(5 * (t - 1)),
        "log": lambda t: 1 - math.exp(-5 * t),
        "none": lambda t: 1.0,
    }
    return 1 / cfg.num_classes + rising[cfg.signal](progress) * (1 - 1 / cfg.num_classes)


def annealed_cross_entropy(logits: Tensor, labels: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the labelled images whose class has at most probability `bound`, and how many those are.

    logits [N, K], labels int64 [N] of this rank. After DDP's mean it is the mean over all ranks' images that count.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(logits, labels, reduction="none")  # [N]
    counts = (-each.detach()).exp() <= bound
    total = collectives.sum_(counts.sum().to(each.dtype))
    return collectives.world_size() * (each * counts).sum() / total.clamp_min(1), total


@full_precision
def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target | softmax(logits)) a row, [N, K] each -> [N]."""
    return (torch.special.xlogy(target, target) - target * F.log_softmax(logits, dim=1)).sum(1)


def consistent(weak: Tensor, strong: Tensor, temperature: float, confidence: float) -> tuple[Tensor, Tensor]:
    """Mean divergence of strong [N, K] from the sharpened weak [N, K], 0 below the confidence; and the share above."""
    weak = weak.detach().to(torch.promote_types(weak.dtype, torch.float32))
    sure = weak.softmax(1).amax(1) > confidence  # [N]
    return (_divergence((weak / temperature).softmax(1), strong) * sure).mean(), sure.double().mean()
