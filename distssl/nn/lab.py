"""CIE Lab of sRGB images, and back: the white is D65 (2 degrees), L in 0..100, a and b about -86..98 and -108..94.

sRGB's curve and primaries are IEC 61966-2-1's, Lab's constants the rounded ones of CIE 15 (0.008856, 7.787), as in
scikit-image, whose numbers these are. Products are written out: a matrix product may be computed in bf16 or TF32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distssl.data import pixels
from distssl.nn.precision import full_precision

XYZ_OF_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)


@full_precision
def of_normalised(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] as `augment.normalise` makes them -> Lab [N, 3, H, W], float."""
    return of_rgb(pixels.rgb(images).clamp(0, 1))


@full_precision
def to_normalised(lab: Tensor) -> Tensor:
    """Lab [N, 3, H, W] -> images [N, 3, H, W] as `augment.normalise` makes them; colours outside sRGB are clipped."""
    return pixels.normalised(to_rgb(lab))


@full_precision
def of_rgb(rgb: Tensor) -> Tensor:
    """sRGB in 0..1 -> Lab, [..., 3, H, W] both, float."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    x, y, z = _mixed(linear, XYZ_OF_RGB)
    fx, fy, fz = (_f(value / white) for value, white in zip((x, y, z), WHITE, strict=True))
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], dim=-3)


@full_precision
def to_rgb(lab: Tensor) -> Tensor:
    """Lab -> sRGB in 0..1, [..., 3, H, W] both, float; colours outside sRGB are clipped."""
    lightness, a, b = lab.unbind(-3)
    fy = (lightness + 16) / 116
    xyz = [_f_inverse(f) * white for f, white in zip((fy + a / 500, fy, fy - b / 200), WHITE, strict=True)]
    inverse = torch.linalg.inv(torch.tensor(XYZ_OF_RGB, dtype=torch.float64)).tolist()
    linear = torch.stack(_mixed(torch.stack(xyz, dim=-3), inverse), dim=-3)
    curved = 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, curved, 12.92 * linear).clamp(0, 1)


def _mixed(channels: Tensor, matrix: tuple[tuple[float, ...], ...] | list[list[float]]) -> list[Tensor]:
    """A 3x3 matrix times the channels of [..., 3, H, W]: three of [..., H, W]."""
    first, second, third = channels.unbind(-3)
    return [row[0] * first + row[1] * second + row[2] * third for row in matrix]


def _f(t: Tensor) -> Tensor:
    return torch.where(t > 0.008856, t.clamp_min(0.008856) ** (1 / 3), 7.787 * t + 16 / 116)


def _f_inverse(f: Tensor) -> Tensor:
    return torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787)
