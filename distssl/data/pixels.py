"""Normalised images and RGB, in torch: `augment.normalise` of the graph, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from distssl.data.augment import MEAN, STD


def normalised(rgb: Tensor) -> Tensor:
    """RGB [..., 3, H, W] in 0..1 -> (rgb - MEAN) / STD, float32 at least."""
    rgb, mean, std = _with_statistics(rgb)
    return (rgb - mean) / std


def rgb(images: Tensor) -> Tensor:
    """Normalised images [..., 3, H, W] -> RGB, in 0..1 of what was an image, float32 at least."""
    images, mean, std = _with_statistics(images)
    return images * std + mean


def _with_statistics(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    mean, std = (images.new_tensor(of_channels)[:, None, None] for of_channels in (MEAN, STD))
    return images, mean, std
