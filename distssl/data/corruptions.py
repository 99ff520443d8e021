"""Corruptions of an image as DALI graph pieces, each from its severity and a few draws.

Types and strengths are in the manner of ImageNet-C: Dan Hendrycks, Thomas Dietterich: Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations, ICLR 2019, https://arxiv.org/abs/1903.12261. A severity in [0, 1]
runs from about its lightest level to its strongest; lengths are shares of the side, as its 224 px have them. DALI's
random operators are not used: noise is cut at drawn offsets from one fixed texture.
"""

# DALI's type stubs lack its enums and know no pipeline without a GPU.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types

from distssl.data import augment, draws
from distssl.data.sample import Sample

REFERENCE_PX = 224  # the side that lengths in pixels are given for
NOISE_STEP = 32  # levels of the texture to a standard deviation
NUM_DRAWS = 4  # of each corruption, whichever it is


@dataclass(frozen=True)
class Strength:
    """How, and how strongly. severity and the draws are scalars in [0, 1) of the graph, on the CPU."""

    severity: Any
    draws: Any  # [NUM_DRAWS]
    size_px: int  # of the square image
    device: str

    def between(self, light: float, strong: float) -> Any:
        return light + (strong - light) * self.severity

    def px(self, at_reference: float) -> float:
        """A length given for REFERENCE_PX, in this image's pixels."""
        return at_reference * self.size_px / REFERENCE_PX


Corruption = Callable[[Any, Strength], Any]  # uint8 [S, S, 3] -> the same


def corrupt(image: Any, names: list[str], chosen: Any, strength: Strength) -> Any:
    """The image with the corruption names[chosen]; `chosen` is an int32 scalar. The others are not computed."""
    return augment.one_of([TYPES[name] for name in names], chosen, image, strength)


def strength(sample: Sample, severity: tuple[float, float], size_px: int) -> Strength:
    """A severity from the range and NUM_DRAWS draws."""
    return Strength(sample.draws.uniform(*severity), sample.draws.units(NUM_DRAWS), size_px, sample.device)


def reencode(image: Any, sample: Sample, quality: tuple[int, int]) -> Any:
    """The image after JPEG at a random quality, libjpeg's, both ends included."""
    low, high = quality
    return fn.jpeg_compression_distortion(image, quality=low + sample.draws.integer(high - low + 1))


def clean(image: Any, how: Strength) -> Any:
    return image


def gaussian_noise(image: Any, how: Strength) -> Any:
    return _uint8(_float(image) + 255 * how.between(0.08, 0.38) * _noise(how))


def speckle_noise(image: Any, how: Strength) -> Any:
    """Noise in proportion to the pixel."""
    return _uint8(_float(image) * (1.0 + how.between(0.15, 0.6) * _noise(how)))


def impulse_noise(image: Any, how: Strength) -> Any:
    """A share of the values becomes 0 or 255; where the noise is beyond a threshold, which the severity lowers."""
    noise, threshold = _noise(how), how.between(2.17, 1.10)  # shares of 0.03 to 0.27
    high, low = _float(noise > threshold), _float(noise < -threshold)
    return _uint8(_float(image) * (1.0 - high - low) + 255 * high)


def gaussian_blur(image: Any, how: Strength) -> Any:
    """Sigma of 1 to 5 px."""
    sigma = how.between(how.px(1.0), how.px(5.0))
    positions = _positions(how.px(3 * 5.0))
    return augment.filtered_both_ways(image, math.exp(-0.5 * positions * positions / (sigma * sigma)), how.device)


def box_blur(image: Any, how: Strength) -> Any:
    """The mean of a square, 3 to 17 px wide; the outermost pixels count by the share that is inside."""
    half = how.between(how.px(1.5), how.px(8.5))
    positions = _positions(how.px(8.5))
    return augment.filtered_both_ways(image, math.clamp(half - math.abs(positions) + 0.5, 0.0, 1.0), how.device)


def motion_blur(image: Any, how: Strength) -> Any:
    """The mean along a line of 5 to 19 px at any angle, the line being a Gaussian of half a pixel across."""
    half = how.between(how.px(2.5), how.px(9.5))
    angle = np.pi * how.draws[2]
    line = _positions(how.px(9.5))
    x, y = fn.reshape(line, shape=[1, -1]), fn.reshape(line, shape=[-1, 1])
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    weights = math.exp(-2.0 * across * across) * math.clamp(half - math.abs(along) + 0.5, 0.0, 1.0)
    taps = weights / fn.reductions.sum(weights)
    return fn.filter(image, taps.gpu() if how.device == "gpu" else taps)


def pixelate(image: Any, how: Strength) -> Any:
    """Down to 0.6 to 0.2 of the side, each pixel then a square."""
    side = math.floor(how.size_px * how.between(0.6, 0.2))
    few = fn.resize(image, size=fn.stack(side, side), antialias=True)
    return fn.resize(few, size=(how.size_px, how.size_px), interp_type=types.INTERP_NN)


def contrast(image: Any, how: Strength) -> Any:
    """Each channel towards its mean, to 0.4 to 0.05 of its distance."""
    x = _float(image)
    mean = fn.reductions.mean(x, axes=[0, 1], keep_dims=True)
    return _uint8(mean + (x - mean) * how.between(0.4, 0.05))


def brightness(image: Any, how: Strength) -> Any:
    """0.15 to 0.5 of the range added or, one time in two, taken away."""
    sign = 1.0 - 2.0 * _float(how.draws[0] < 0.5)
    return _uint8(_float(image) + 255 * sign * how.between(0.15, 0.5))


def saturation(image: Any, how: Strength) -> Any:
    """Distance from grey times 0.3 to 0 or, one time in two, 2 to 6."""
    more = _float(how.draws[0] < 0.5)
    return fn.saturation(image, saturation=more * how.between(2.0, 6.0) + (1.0 - more) * how.between(0.3, 0.0))


def occlusion(image: Any, how: Strength) -> Any:
    """A grey rectangle somewhere, a fifth to a half of the side high and 3/4 to 5/4 as wide."""
    side = how.size_px * how.between(0.2, 0.5)
    height, width = math.floor(side), math.floor(side * (0.75 + 0.5 * how.draws[2]))
    top, left = (how.size_px - height) * how.draws[0], (how.size_px - width) * how.draws[1]
    anchor = fn.stack(math.floor(top), math.floor(left))
    return fn.erase(image, anchor=anchor, shape=fn.stack(height, width), axis_names="HW", fill_value=128)


def posterise(image: Any, how: Strength) -> Any:
    """2 to 5 grey levels a channel, each the middle of what it stands for."""
    step = 256.0 / math.floor(how.between(5.999, 2.0))
    return _uint8((math.floor(_float(image) / step) + 0.5) * step)


TYPES: dict[str, Corruption] = {
    piece.__name__: piece
    for piece in (
        clean,
        gaussian_noise,
        speckle_noise,
        impulse_noise,
        gaussian_blur,
        box_blur,
        motion_blur,
        pixelate,
        contrast,
        brightness,
        saturation,
        occlusion,
        posterise,
    )
}


@functools.cache
def texture(size_px: int) -> np.ndarray:
    """Independent normal numbers times NOISE_STEP, rounded: int8 [T, T, 3], twice an image of size_px wide."""
    side = 2 * size_px
    numbers = draws.hash64(0x7E07, np.arange(side * side * 3)).reshape(side, side, 3)
    # By Box and Muller, from the upper and the lower half of the hash.
    radius = np.sqrt(-2 * np.log(((numbers >> np.uint64(32)).astype(np.float64) + 1) * 2.0**-32))
    normal = radius * np.cos(2 * np.pi * (numbers & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32)
    return np.clip(np.rint(NOISE_STEP * normal), -127, 127).astype(np.int8)


def _noise(how: Strength) -> Any:
    """Normal noise from a drawn place of the texture, float32 [S, S, 3]: there are size_px**2 of them."""
    whole = types.Constant(texture(how.size_px), device=how.device)
    place = fn.cast(math.floor(how.draws[0:2] * float(how.size_px)), dtype=types.INT32)
    cut = fn.slice(whole, place, [how.size_px, how.size_px], axes=[0, 1])
    return fn.cast(cut, dtype=types.FLOAT) / float(NOISE_STEP)


def _positions(reach: float) -> Any:
    """-r to r around 0 for r = reach rounded up, float32 [2 r + 1]."""
    rounded = int(np.ceil(reach))
    return types.Constant(np.arange(-rounded, rounded + 1, dtype=np.float32))


def _float(image: Any) -> Any:
    return fn.cast(image, dtype=types.FLOAT)


def _uint8(image: Any) -> Any:
    """Rounded and cut off at 0 and 255."""
    return fn.cast(math.clamp(image, 0.0, 255.0), dtype=types.UINT8)
