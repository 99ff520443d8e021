"""Inpainting (context encoder): fill in the hole from what is around it.

    L = (1 - lambda) L_rec + lambda L_adv                                                                   (eq. 3)
    L_rec = |M * (x - F((1 - M) * x))|^2, 10 times as much in a border of 7 px around the hole, which is seen  (eq. 1)
    L_adv = max_D  log D(x) + log(1 - D(F((1 - M) * x)))                                                     (eq. 2)

x the image, M the hole, filled with the mean colour, F the backbone's feature map, a fully connected layer in each of
its channels and a decoder; lambda = 0.001.

Deepak Pathak, Philipp Kraehenbuehl, Jeff Donahue, Trevor Darrell, Alexei A. Efros: Context Encoders: Feature Learning
by Inpainting. CVPR 2016. https://arxiv.org/abs/1604.07379

There is one loss, one backward pass and one optimiser, and no gradient crosses over:

    loss = (1 - lambda) L_rec - lambda log D'(F)  -  log D(x) - log(1 - D(F'))

D' is the discriminator with its parameters held constant, F' the filled image held constant. So both players move at
once, from the same point, where the published code moves D first; its learning rate is a tenth of the run's, as there.
As there, the generator ascends log D(F), not log(1 - D(F)), and D sees what is predicted without its context: of x and
of F the hole and its border. D(x) and D(F) are separate calls, each normalised by the statistics of its global batch.

Deviations. L_rec is, in each image, a mean over the hole and its border, so that every image counts the same. It is of
normalised pixels, where the published code's lie in -1..1. The published border lies inside the centre block; here it
is around the hole, as wide a share of the side as 7 px of 227. Random holes are the paper's blocks, not the shapes of
its third kind, and the fully connected layers need images of one size, which they are.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call

from distssl import method
from distssl.data import augment, pixels
from distssl.data.augment import Crop
from distssl.nn import decoders, optim
from distssl.nn.precision import full_precision

BORDER = 7 / 227  # of the side
AREA = 1 / 4  # the largest share of the image that random holes take


class Config(method.Options):
    """The paper's values for learning features; the adversarial term is its inpainting network's."""

    mask: Literal["centre", "random"] = Field(default="random", description="a block of half the side, or several")
    blocks: PositiveInt = Field(default=4, description="of a random hole; they may overlap")
    border_weight: float = Field(default=10.0, ge=0, description="of the pixels around the hole")
    adversarial: float = Field(default=0.001, ge=0, le=1, description="lambda; 0: no discriminator")
    decoder: tuple[PositiveInt, ...] = Field(default=(128, 64, 64, 32, 16), min_length=1, description="its widths")
    discriminator: tuple[PositiveInt, ...] = Field(default=(64, 128, 256, 512), min_length=1, description="its widths")
    augment: Crop = Crop()

    small: ClassVar = {
        "decoder": [32, 16],
        "discriminator": [8, 16],
        "augment": {"resize_px": 36, "size_px": 32},
    }


class ChannelwiseLinear(nn.Module):
    """[N, C, h, w] -> the same: in each channel a Linear from all places to all places, then a 1x1 convolution."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        places = height * width
        bound = places**-0.5  # nn.Linear's
        self.weight = nn.Parameter(torch.empty(channels, places, places).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels * places).uniform_(-bound, bound))  # flat, as biases are
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.view(len(self.weight), 1, -1)  # [C, 1, h*w]
        y = x.flatten(2).transpose(0, 1) @ self.weight + bias  # [C, N, h*w]
        return self.mix(F.relu(y).transpose(0, 1).unflatten(2, x.shape[2:]))


class Discriminator(nn.Sequential):
    """Images [N, 3, H, W] -> logits [N] that they are real: DCGAN's 4x4 convolutions of stride 2, then an average."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(zip((3, *widths), widths, strict=False)):
            layers.append(nn.Conv2d(before, after, 4, stride=2, padding=1, bias=number == 0))
            layers += [nn.BatchNorm2d(after)] if number else []
            layers.append(nn.LeakyReLU(0.2, inplace=True))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1), nn.Flatten(0))


class Inpainting(method.Method):
    Config = Config

    def build(self) -> None:
        cfg = self.cfg
        shape = self.backbone.use_maps(cfg.augment.size_px)[-1]
        self.bottleneck = ChannelwiseLinear(*shape)
        self.decoder = decoders.Decoder(shape[0], cfg.decoder, 3)
        self.discriminator = Discriminator(cfg.discriminator) if cfg.adversarial else None

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        image = augment.crop(sample, cfg.augment)
        views = {"image": augment.normalise_mirrored(image, sample.draws, cfg.augment.flip)}
        return views | ({"units": sample.draws.units(3 * cfg.blocks)} if cfg.mask == "random" else {})

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        image, hole = views["image"], self.hole(views)
        region = with_border(hole)
        filled = self.fill(image, hole)  # [N, 3, S, S]
        reconstruction = reconstruction_loss(filled, image, hole, region, self.cfg.border_weight)
        outputs = {"loss": (1 - self.cfg.adversarial) * reconstruction, "reconstruction": reconstruction.detach()}
        if self.discriminator is not None:
            generator, discriminator = adversarial_losses(self.discriminator, image * region, filled * region)
            outputs["loss"] = outputs["loss"] + self.cfg.adversarial * generator + discriminator
            outputs |= {"generator": generator.detach(), "discriminator": discriminator.detach()}
        return outputs | psnr(filled.detach(), image, hole)

    def fill(self, image: Tensor, hole: Tensor) -> Tensor:
        """Images [N, 3, S, S] without what is in the hole, bool [N, 1, S, S] -> images [N, 3, S, S]."""
        features = self.backbone.feature_map(image.masked_fill(hole, 0.0))  # normalised, so 0 is the mean colour
        return self.decoder(F.relu(self.bottleneck(features)), image.shape[2])

    def hole(self, views: dict[str, Tensor]) -> Tensor:
        """What is missing of each image: bool [N, 1, S, S]."""
        image = views["image"]
        if self.cfg.mask == "random":
            return random_hole(views["units"].to(image.device), image.shape[2])
        return centre_hole(image)

    def rate(self, name: str, parameter: nn.Parameter) -> optim.Rate:
        return optim.Rate(scale=0.1 if name.startswith("discriminator.") else 1.0)

    def picture(self, views: dict[str, Tensor]) -> list[Tensor]:
        """The image with its hole, the answer in the hole, the truth."""
        image, hole = views["image"], self.hole(views)
        filled = self.fill(image, hole).to(image.dtype)
        return [image.masked_fill(hole, 0.0), torch.where(hole, filled, image), image]


def centre_hole(images: Tensor) -> Tensor:
    """[N, C, S, S] -> bool [N, 1, S, S], true in the middle block of half the side."""
    size_px = images.shape[2]
    hole = torch.zeros_like(images[:, :1], dtype=torch.bool)
    start, side = size_px // 4, size_px // 2
    hole[:, :, start : start + side, start : start + side] = True
    return hole


def random_hole(units: Tensor, size_px: int) -> Tensor:
    """Draws [N, 3K] in [0, 1), for each of K squares its side, top and left -> bool [N, 1, S, S], true in any of them.

    Sides are uniform between half and all of what makes K squares AREA of the image.
    """
    side, top, left = units.unflatten(1, (-1, 3)).unbind(2)  # [N, K] each
    longest = max(1, math.floor(size_px * math.sqrt(AREA / side.shape[1])))
    shortest = max(1, longest // 2)
    side = shortest + (side * (longest - shortest + 1)).floor()
    within = []
    for start in (top, left):
        start = (start * (size_px - side + 1)).floor()[..., None]  # [N, K, 1]
        places = torch.arange(size_px, device=units.device)
        within.append((places >= start) & (places < start + side[..., None]))  # [N, K, S]
    return (within[0][..., None] & within[1][:, :, None]).any(1, keepdim=True)


def with_border(hole: Tensor) -> Tensor:
    """The hole and the pixels at most BORDER of the side from it, bool [N, 1, S, S]."""
    reach = round(hole.shape[2] * BORDER)
    return F.max_pool2d(hole.float(), 2 * reach + 1, stride=1, padding=reach).bool()


@full_precision
def reconstruction_loss(filled: Tensor, images: Tensor, hole: Tensor, region: Tensor, border_weight: float) -> Tensor:
    """Weighted squares of [N, 3, S, S], averaged over each image's region, then over N: a scalar.

    hole and region, which is the hole with its border, are bool [N, 1, S, S]; the weight is 1 in the hole.
    """
    weights = torch.where(hole, 1.0, border_weight * region.to(images.dtype))
    squares = (weights * (filled - images).square()).sum((1, 2, 3))  # [N]
    return (squares / (images.shape[1] * region.sum((1, 2, 3)))).mean()


def adversarial_losses(discriminator: nn.Module, images: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
    """-log D(filled), whose gradient is of `filled` alone, and -log D(images) - log(1 - D(filled)), of D alone.

    Means over this rank's images. With BatchNorm over all ranks their mean over ranks has the whole batch's gradient.
    """
    constants = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    as_real = functional_call(discriminator, constants, (filled,))  # [N]
    real, fake = discriminator(images), discriminator(filled.detach())  # [N] each
    return _minus_log(as_real), _minus_log(real) + _minus_log(-fake)


@full_precision
def _minus_log(logits: Tensor) -> Tensor:
    """Mean of -log sigmoid(logits), [N] -> scalar."""
    return F.softplus(-logits).mean()


@torch.no_grad()
def psnr(filled: Tensor, images: Tensor, hole: Tensor) -> dict[str, Tensor]:
    """Peak signal-to-noise ratio in dB of the hole, and of the image with the answer in the hole; means over N."""
    error = (pixels.rgb(filled).clamp(0, 1) - pixels.rgb(images)) * hole  # of RGB in 0..1
    squares, channels = error.square().sum((1, 2, 3)), images.shape[1]
    num_pixels = {"psnr_hole": hole.sum((1, 2, 3)), "psnr_image": hole[0].numel()}
    return {
        name: (-10 * (squares / (channels * num)).clamp_min(1e-10).log10()).mean() for name, num in num_pixels.items()
    }
