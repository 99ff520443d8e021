"""Augmentations as DALI graph pieces, fed by draws: encoded bytes in, one view out.

Every function takes and returns DataNodes and runs on the CPU and on the GPU alike: argument inputs and conditions
stay on the CPU, as DALI wants them. Images are uint8 [H, W, 3] until `normalise`.
"""

# DALI's type stubs lack its enums and know no pipeline without a GPU.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types
from pydantic import BaseModel, ConfigDict, Field, model_validator

from distssl.data.draws import Draws
from distssl.data.sample import Sample
from distssl.settings import Range

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in 0..1; what downstream users of a backbone expect
STD = (0.229, 0.224, 0.225)
CROP_ATTEMPTS = 10


class Crop(BaseModel):
    """A square at a random place of the resized image, and a flip: what most pretext tasks allow themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize_px: int = Field(default=256, ge=8, description="of the short side")
    size_px: int = Field(default=224, ge=8)
    flip: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _fits(self) -> Crop:
        if self.size_px > self.resize_px:
            raise ValueError(f"size_px={self.size_px} must be at most resize_px={self.resize_px}")
        return self


class Augment(BaseModel):
    """SimCLR's augmentations (Chen et al., ICML 2020, appendix A), with its values for ImageNet as defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_px: int = Field(default=224, ge=8)
    crop_area: Range = (0.08, 1.0)
    crop_aspect: Range = (3 / 4, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)
    jitter: float = Field(default=0.8, ge=0, le=1)
    brightness: float = Field(default=0.8, ge=0, le=1)
    contrast: float = Field(default=0.8, ge=0, le=1)
    saturation: float = Field(default=0.8, ge=0, le=1)
    hue_degrees: float = Field(default=72.0, ge=0, le=180)
    grey: float = Field(default=0.2, ge=0, le=1)
    blur: float = Field(default=0.5, ge=0, le=1)
    blur_sigma: Range = (0.1, 2.0)
    solarize: float = Field(default=0.0, ge=0, le=1)
    solarize_threshold: int = Field(default=128, ge=0, le=255)


class MoCoAugment(Augment):
    """MoCo v2's augmentations (Chen et al., 2020, https://arxiv.org/abs/2003.04297), which SimSiam takes over."""

    crop_area: Range = (0.2, 1.0)
    brightness: float = Field(default=0.4, ge=0, le=1)
    contrast: float = Field(default=0.4, ge=0, le=1)
    saturation: float = Field(default=0.4, ge=0, le=1)
    hue_degrees: float = Field(default=36.0, ge=0, le=180)


class Asymmetric(Augment):
    """BYOL's augmentations (Grill et al., NeurIPS 2020, table 6): the second view is rarely blurred, and solarised."""

    brightness: float = Field(default=0.4, ge=0, le=1)
    contrast: float = Field(default=0.4, ge=0, le=1)
    saturation: float = Field(default=0.2, ge=0, le=1)
    hue_degrees: float = Field(default=36.0, ge=0, le=180)
    blur: float = Field(default=1.0, ge=0, le=1)
    second_blur: float = Field(default=0.1, ge=0, le=1)
    second_solarize: float = Field(default=0.2, ge=0, le=1)

    @property
    def second(self) -> Augment:
        """The second view's augmentations."""
        return self.model_copy(update={"blur": self.second_blur, "solarize": self.second_solarize})


class LargeCrop(Augment):
    """SwAV's large crops (Caron et al., NeurIPS 2020, https://arxiv.org/abs/2006.09882)."""

    crop_area: Range = (0.14, 1.0)


class SmallCrop(Augment):
    """SwAV's small crops."""

    size_px: int = Field(default=96, ge=8)
    crop_area: Range = (0.05, 0.14)


def view(sample: Sample, cfg: Augment) -> Any:
    """One augmented view: float32 [size_px, size_px, 3], normalised."""
    draws, device = sample.draws, sample.device
    image = random_resized_crop(sample, cfg.size_px, cfg.crop_area, cfg.crop_aspect)
    image = colour_jitter(image, draws, cfg)
    image = grey(image, draws, cfg.grey)
    if cfg.blur:
        image = blur(image, draws, device, cfg.blur, cfg.blur_sigma)
    if cfg.solarize:
        image = solarize(image, draws, cfg.solarize, cfg.solarize_threshold)
    return normalise_mirrored(image, draws, cfg.flip)


def crop(sample: Sample, cfg: Crop) -> Any:
    """A random square: uint8 [size_px, size_px, 3], not flipped."""
    image = fn.resize(sample.whole(), resize_shorter=cfg.resize_px, antialias=True)
    return square(image, cfg.size_px, sample.draws.unit(), sample.draws.unit())


def crop_with_mask(sample: Sample, cfg: Crop) -> tuple[Any, Any]:
    """The same random square of the image and of its mask, neither flipped: uint8 [S, S, 3] and [S, S, 1]."""
    x, y = sample.draws.unit(), sample.draws.unit()
    image = fn.resize(sample.whole(), resize_shorter=cfg.resize_px, antialias=True)
    mask = fn.resize(sample.classes(), resize_shorter=cfg.resize_px, interp_type=types.INTERP_NN)
    return square(image, cfg.size_px, x, y), square(mask, cfg.size_px, x, y)


def square(image: Any, size_px: int, x: Any, y: Any) -> Any:
    """x, y: place of the square, 0 to 1 of the room there is."""
    return fn.crop(image, crop_h=size_px, crop_w=size_px, crop_pos_x=x, crop_pos_y=y)


def one_of(operations: Sequence[Callable[[Any, Any], Any]], chosen: Any, image: Any, how: Any) -> Any:
    """operations[chosen](image, how); `chosen` is an int32 scalar. The others are not computed."""
    for number, operation in enumerate(operations):
        if chosen == number:
            image = operation(image, how)
    return image


def pair(sample: Sample, cfg: Augment) -> dict[str, Any]:
    """Two views "a" and "b", each as `view`."""
    second = cfg.second if isinstance(cfg, Asymmetric) else cfg
    return {"a": view(sample, cfg), "b": view(sample, second)}


def multi_crop(sample: Sample, large: Augment, small: Augment, num_small: int) -> dict[str, Any]:
    """SwAV's crops: "a" and "b" as `pair`, and num_small of them, "local0" on; the image is decoded once."""
    sample = sample.decoded()
    return pair(sample, large) | {f"local{i}": view(sample, small) for i in range(num_small)}


def random_resized_crop(sample: Sample, size_px: int, area: tuple[float, float], aspect: tuple[float, float]) -> Any:
    """Decode a random region alone and resize it, antialiased, to a square.

    The region has a uniform share of the image's area and a log-uniform aspect (width over height); the first of
    CROP_ATTEMPTS pairs that fits into the image is taken, as torchvision's RandomResizedCrop does, so that recipes
    carry over. Where none fits, it is the largest region of an allowed aspect.
    """
    draws = sample.draws
    height, width = sample.size()
    pixels = height * width * (area[0] + (area[1] - area[0]) * draws.units(CROP_ATTEMPTS))
    ratio = math.exp(np.log(aspect[0]) + np.log(aspect[1] / aspect[0]) * draws.units(CROP_ATTEMPTS))
    widths, heights = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
    fits = fn.cast((widths <= width) & (heights <= height), dtype=types.FLOAT)
    turns = types.Constant(np.arange(CROP_ATTEMPTS, 0, -1, dtype=np.float32))
    first = fn.reductions.max(fits * turns)  # 0 where none fits
    chosen = fn.cast(turns == first, dtype=types.FLOAT)  # [CROP_ATTEMPTS], at most a single 1
    none = fn.cast(first == 0.0, dtype=types.FLOAT)
    crop_w = fn.reductions.sum(widths * chosen) + none * math.min(width, height * aspect[1])
    crop_h = fn.reductions.sum(heights * chosen) + none * math.min(height, width / aspect[0])
    crop_w, crop_h = math.clamp(crop_w, 1.0, width), math.clamp(crop_h, 1.0, height)
    top, left = (height - crop_h) * draws.unit(), (width - crop_w) * draws.unit()
    return fn.resize(sample.region(top, left, crop_h, crop_w), size=(size_px, size_px), antialias=True)


def centre_crop(sample: Sample, size_px: int, resize_px: int) -> Any:
    """Decode, resize the short side to resize_px, antialiased, and cut the middle square of size_px."""
    image = fn.resize(sample.whole(), resize_shorter=resize_px, antialias=True)
    return fn.crop(image, crop_h=size_px, crop_w=size_px)


def colour_jitter(image: Any, draws: Draws, cfg: Augment) -> Any:
    """Brightness, contrast, saturation and hue, in this order, with probability cfg.jitter."""
    chosen = draws.coin(cfg.jitter)
    brightness = draws.uniform(1 - cfg.brightness, 1 + cfg.brightness)
    contrast = draws.uniform(1 - cfg.contrast, 1 + cfg.contrast)
    saturation = draws.uniform(1 - cfg.saturation, 1 + cfg.saturation)
    hue = draws.uniform(-cfg.hue_degrees, cfg.hue_degrees)
    if chosen:
        image = fn.color_twist(image, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    return image


def grey(image: Any, draws: Draws, probability: float) -> Any:
    """Luma in all three channels."""
    if draws.coin(probability):
        luma = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
        image = fn.color_space_conversion(luma, image_type=types.GRAY, output_type=types.RGB)
    return image


def blur(image: Any, draws: Draws, device: str, probability: float, sigma: tuple[float, float]) -> Any:
    """Gaussian blur, the window sized for the largest sigma: 2 * ceil(3 sigma) + 1.

    Two filters of one dimension cost a third of DALI's own gaussian_blur with this window, and stay within one grey
    level of it.
    """
    reach = int(np.ceil(3 * sigma[1]))
    chosen = draws.coin(probability)
    drawn = draws.uniform(*sigma)
    if chosen:
        exponent = types.Constant(-0.5 * np.arange(-reach, reach + 1, dtype=np.float32) ** 2)
        image = filtered_both_ways(image, math.exp(exponent / (drawn * drawn)), device)
    return image


def filtered_both_ways(image: Any, weights: Any, device: str) -> Any:
    """Along both sides with the same weights, float32 [w] on the CPU, made to sum to 1."""
    taps = weights / fn.reductions.sum(weights)
    if device == "gpu":
        taps = taps.gpu()
    return fn.filter(fn.filter(image, fn.reshape(taps, shape=[1, -1])), fn.reshape(taps, shape=[-1, 1]))


def solarize(image: Any, draws: Draws, probability: float, threshold: int) -> Any:
    """Invert the pixels at or above the threshold; threshold 0 inverts the image."""
    if draws.coin(probability):
        above = image >= threshold
        inverted = fn.cast(above, dtype=types.UINT8) * (255 - image)
        kept = fn.cast(image < threshold, dtype=types.UINT8) * image
        image = fn.cast(inverted + kept, dtype=types.UINT8)
    return image


def flip(image: Any, mirror: Any) -> Any:
    """Left to right where `mirror` says so."""
    return fn.flip(image, horizontal=fn.cast(mirror, dtype=types.INT32))


def normalise(image: Any, mirror: Any = False) -> Any:
    """float32 [H, W, 3]: (x / 255 - MEAN) / STD, mirrored left to right where `mirror` says so.

    The layout stays HWC, so a batch is channels_last in torch without a copy.
    """
    return fn.crop_mirror_normalize(
        image,
        mirror=fn.cast(mirror, dtype=types.INT32),
        mean=[255 * m for m in MEAN],
        std=[255 * s for s in STD],
        dtype=types.FLOAT,
        output_layout="HWC",
    )


def normalise_mirrored(image: Any, draws: Draws, probability: float) -> Any:
    """As `normalise`, mirrored with a probability."""
    return normalise(image, mirror=draws.coin(probability))
