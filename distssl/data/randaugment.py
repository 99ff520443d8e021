"""RandAugment as a DALI graph piece, fed by draws: a few operations of a list, each of a random strength.

Ekin D. Cubuk, Barret Zoph, Jonathon Shlens, Quoc V. Le: RandAugment: Practical automated data augmentation with a
reduced search space. NeurIPS 2020. https://arxiv.org/abs/1909.13719. As in UDA the strength of each operation is
uniform up to its largest, and a grey square is cut out at the end (DeVries and Taylor,
https://arxiv.org/abs/1708.04552).
"""

# DALI's type stubs lack its enums and know no pipeline without a GPU.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types
from pydantic import BaseModel, ConfigDict, Field

from distssl.data import augment
from distssl.data.draws import Draws
from distssl.data.sample import Sample

GREY = 128  # what comes in from outside, and the hole
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's SMOOTH


class RandAugment(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    num_operations: int = Field(default=2, ge=0)
    strength: float = Field(default=1.0, gt=0, le=1, description="share of each operation's largest")
    cutout: float = Field(default=0.5, ge=0, lt=1, description="side of the hole, a share of the image's")


def view(image: Any, sample: Sample, cfg: RandAugment, size_px: int) -> Any:
    """uint8 [size_px, size_px, 3] -> the same, by num_operations operations and a hole."""
    for _ in range(cfg.num_operations):
        image = _one(image, sample.draws, sample.device, cfg.strength, size_px)
    return cut_out(image, sample.draws, round(cfg.cutout * size_px), size_px) if cfg.cutout else image


def _one(image: Any, draws: Draws, device: str, strength: float, size_px: int) -> Any:
    """One operation, each as likely; only the one that is drawn is computed."""
    chosen, amount = draws.integer(len(OPERATIONS)), strength * draws.unit()
    sign = 2.0 * fn.cast(draws.coin(0.5), dtype=types.FLOAT) - 1.0
    how = Strength(amount, sign * amount, size_px, device)
    return augment.one_of(OPERATIONS, chosen, image, how)


@dataclass(frozen=True)
class Strength:
    """amount in [0, 1) and signed in (-1, 1): float32 scalars of the graph, on the CPU."""

    amount: Any
    signed: Any
    size_px: int
    device: str

    @property
    def factor(self) -> Any:
        """Of an enhancement: 1 leaves the image, 0.1 and 1.9 are the ends."""
        return 1.0 + 0.9 * self.signed


def identity(image: Any, how: Strength) -> Any:
    return image


def autocontrast(image: Any, how: Strength) -> Any:
    """Each channel stretched to 0..255."""
    x = fn.cast(image, dtype=types.FLOAT)
    low = fn.reductions.min(x, axes=(0, 1), keep_dims=True)
    high = fn.reductions.max(x, axes=(0, 1), keep_dims=True)
    return fn.cast_like((x - low) * (255.0 / math.max(high - low, 1.0)), image)


def equalize(image: Any, how: Strength) -> Any:
    return fn.equalize(image)


def solarize(image: Any, how: Strength) -> Any:
    """Pixels from 256 (1 - amount) on inverted."""
    threshold = fn.cast(256.0 * (1.0 - how.amount), dtype=types.INT32)
    above = fn.cast(image >= threshold, dtype=types.UINT8)
    return fn.cast(above * (255 - image) + (1 - above) * image, dtype=types.UINT8)


def posterize(image: Any, how: Strength) -> Any:
    """The top 8 to 4 bits of each pixel."""
    kept = fn.cast(8.0 - math.floor(how.amount * 5.0), dtype=types.FLOAT)
    step = fn.cast(math.pow(2.0, 8.0 - kept), dtype=types.INT32)
    return fn.cast((fn.cast(image, dtype=types.INT32) // step) * step, dtype=types.UINT8)


def colour(image: Any, how: Strength) -> Any:
    return fn.color_twist(image, saturation=how.factor)


def contrast(image: Any, how: Strength) -> Any:
    return fn.contrast(image, contrast=how.factor, contrast_center=float(GREY))


def brightness(image: Any, how: Strength) -> Any:
    return fn.brightness(image, brightness=how.factor)


def sharpness(image: Any, how: Strength) -> Any:
    """Away from, or towards, a smoothed image."""
    smooth = fn.cast(fn.filter(image, types.Constant(SMOOTH, device=how.device)), dtype=types.FLOAT)
    x = fn.cast(image, dtype=types.FLOAT)
    return fn.cast_like(math.clamp(smooth + how.factor * (x - smooth), 0.0, 255.0), image)


def rotate(image: Any, how: Strength) -> Any:
    """By up to 30 degrees."""
    middle = (how.size_px / 2, how.size_px / 2)
    return _warp(image, fn.transforms.rotation(angle=30.0 * how.signed, center=middle))


def shear_x(image: Any, how: Strength) -> Any:
    return _warp(image, fn.transforms.shear(shear=fn.stack(0.3 * how.signed, 0.0 * how.signed)))


def shear_y(image: Any, how: Strength) -> Any:
    return _warp(image, fn.transforms.shear(shear=fn.stack(0.0 * how.signed, 0.3 * how.signed)))


def translate_x(image: Any, how: Strength) -> Any:
    return _warp(image, fn.transforms.translation(offset=fn.stack(how.size_px * 0.3 * how.signed, 0.0 * how.signed)))


def translate_y(image: Any, how: Strength) -> Any:
    return _warp(image, fn.transforms.translation(offset=fn.stack(0.0 * how.signed, how.size_px * 0.3 * how.signed)))


def cut_out(image: Any, draws: Draws, side_px: int, size_px: int) -> Any:
    """A grey square whose middle is anywhere in the image."""
    top, left = (draws.unit() * size_px - side_px / 2 for _ in range(2))
    return fn.erase(
        image, anchor=fn.stack(top, left), shape=[side_px, side_px], axis_names="HW", fill_value=float(GREY)
    )


def _warp(image: Any, matrix: Any) -> Any:
    """By an affine map from output to input."""
    return fn.warp_affine(image, matrix, fill_value=float(GREY), interp_type=types.INTERP_LINEAR)


OPERATIONS: tuple[Callable[[Any, Strength], Any], ...] = (
    identity,
    autocontrast,
    equalize,
    solarize,
    posterize,
    colour,
    contrast,
    brightness,
    sharpness,
    rotate,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)
