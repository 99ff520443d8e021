"""Colorization: from the grey image, which of 313 colours has each pixel?

    L = - mean over pixels of  v(Z) sum_q Z_q log P_q                                                        (eq. 2)
    v(Z) = w_q*,  q* = argmax_q Z_q,    w proportional to ((1 - lambda) p + lambda / Q)^-1,  E[w] = 1        (eq. 3, 4)

P is the predicted distribution over the Q bins of the ab plane, Z the true colour spread over its 5 nearest bins by a
Gaussian of sigma 5, p how often each bin occurs, smoothed by a Gaussian of sigma 5. Colours are read off P as the mean
of P^(1/T), normalised, T = 0.38 (eq. 5). The bins are computed, not read from a file; see `ab_bins.centres`.

Richard Zhang, Phillip Isola, Alexei A. Efros: Colorful Image Colorization. ECCV 2016. https://arxiv.org/abs/1603.08511

Deviations. p is counted from the images of the run, of all ranks and up to the optimiser step before, from one pixel in
every bin on: the paper counts ImageNet beforehand, and there is no such file for other images. Any backbone can be
trained: its input is (L - 50) / 25 in three channels, where the paper's single channel is L - 50, and its feature map,
whatever the stride, goes through a light decoder to a quarter of the image's side; the paper's network is dilated. As
in the published code the true colours there are those of every fourth pixel, for a mean of pixels would be greyer. The
sum over pixels is a mean, and images without colour, which that code leaves out, count as well. What is evaluated is
the backbone with the grey input it was trained on.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from distssl import collectives, method
from distssl.data import augment
from distssl.data.augment import Crop
from distssl.nn import ab_bins, backbones, decoders, lab

STRIDE = 4  # pixels between two that are predicted


class Config(method.Options):
    """The paper's values; the decoder is ours."""

    uniform: float = Field(default=0.5, ge=0, le=1, description="lambda: 0 balances bins fully, 1 not at all")
    temperature: float = Field(default=0.38, gt=0, le=1, description="of the annealed mean, in pictures")
    decoder: tuple[PositiveInt, ...] = Field(default=(256, 128, 128), min_length=1, description="its widths")
    augment: Crop = Crop()

    small: ClassVar = {"decoder": [32, 32], "augment": {"resize_px": 36, "size_px": 32}}


class Grey(backbones.Backbone):
    """A backbone that sees the lightness alone of the images [N, 3, H, W] it is given."""

    def __init__(self, backbone: backbones.Backbone) -> None:
        super().__init__(backbone, backbone.num_features)

    def _feature_map(self, x: Tensor) -> Tensor:
        return self._backbone().feature_map(grey(x))

    def _features(self, x: Tensor) -> Tensor:
        return self._backbone().features(grey(x))

    def pyramid(self, x: Tensor) -> list[Tensor]:
        return self._backbone().pyramid(grey(x))

    def stages(self) -> dict[str, int]:
        return {f"net.{name}": stage for name, stage in self._backbone().stages().items()}

    def _backbone(self) -> backbones.Backbone:
        assert isinstance(self.net, backbones.Backbone)
        return self.net


class Colorization(method.Method):
    Config = Config

    counts: Tensor

    def build(self) -> None:
        channels, _, _ = self.backbone.use_maps(self.cfg.augment.size_px)[-1]
        self.bins = ab_bins.Bins()
        self.decoder = decoders.Decoder(channels, self.cfg.decoder, len(self.bins))
        # Whole numbers: exact after any number of pixels, and the same in whatever order ranks add theirs.
        self.register_buffer("counts", torch.ones(len(self.bins), dtype=torch.int64))
        self._fresh: list[Tensor] = []  # this rank's counts since the last optimiser step, one a batch

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        image = augment.crop(sample, cfg.augment)
        return {"image": augment.normalise_mirrored(image, sample.draws, cfg.augment.flip)}

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        image = views["image"]
        bins, soft = self.bins.encode(lab.of_normalised(image)[:, 1:, ::STRIDE, ::STRIDE])  # [N, 5, S/4, S/4] each
        self._fresh.append(self.bins.count(bins[:, 0]))
        logits = self.logits(image)  # [N, Q, S/4, S/4]
        weights = self.bins.rebalancing(self.counts, self.cfg.uniform)  # [Q]
        return {
            "loss": ab_bins.rebalanced_cross_entropy(logits, bins, soft, weights),
            "accuracy": (logits.argmax(1) == bins[:, 0]).double().mean(),
            "bins_seen": (self.counts > 1).sum().double(),
        }

    def logits(self, image: Tensor) -> Tensor:
        """Images [N, 3, S, S] -> [N, Q, S/4, S/4], S/4 rounded up."""
        return self.decoder(self.backbone.feature_map(grey(image)), -(-image.shape[2] // STRIDE))

    def on_step_end(self, progress: float) -> None:
        self.counts += collectives.sum_(torch.stack(self._fresh).sum(0))
        self._fresh.clear()

    def evaluated(self) -> backbones.Backbone:
        return Grey(self.backbone)

    def picture(self, views: dict[str, Tensor]) -> list[Tensor]:
        """What the network sees, the colours it gives, the true ones."""
        image = views["image"]
        lightness = lab.of_normalised(image)[:, :1]  # [N, 1, S, S]
        ab = self.bins.annealed_mean(self.logits(image), self.cfg.temperature)
        ab = F.interpolate(ab, size=image.shape[2:], mode="bilinear", align_corners=False)  # [N, 2, S, S]
        coloured = [lab.to_normalised(torch.cat([lightness, colours], dim=1)) for colours in (torch.zeros_like(ab), ab)]
        return [*coloured, image]


def grey(images: Tensor) -> Tensor:
    """Images as `augment.normalise` makes them -> (L - 50) / 25 in all three channels, [N, 3, H, W] both."""
    lightness = (lab.of_normalised(images)[:, :1] - 50) / 25  # mean and deviation near 0 and 1 on photographs
    return lightness.expand_as(images).contiguous(memory_format=torch.channels_last)
