"""Where the points and boxes of an image lie in a view of it, and back. A frame is what data.windows gives."""

from __future__ import annotations

import torch
from torch import Tensor


def into_view(points: Tensor, frame: Tensor) -> Tensor:
    """Points [..., 2], x and y in an image's pixels -> in its view's; frame: [5]. (0, 0) is the corner of a pixel."""
    left, top, side, scale, mirror = frame.to(points.dtype)
    x, y = points[..., 0] - left, points[..., 1] - top
    x = torch.where(mirror > 0, side - x, x)
    return torch.stack([x, y], dim=-1) * scale


def out_of_view(points: Tensor, frame: Tensor) -> Tensor:
    """The inverse of `into_view`."""
    left, top, side, scale, mirror = frame.to(points.dtype)
    x, y = points[..., 0] / scale, points[..., 1] / scale
    x = torch.where(mirror > 0, side - x, x)
    return torch.stack([x + left, y + top], dim=-1)


def boxes_into_view(boxes: Tensor, frame: Tensor) -> Tensor:
    """Boxes [n, 4] as x0, y0, x1, y1, likewise; not clipped to the view."""
    return _ordered(into_view(boxes.unflatten(1, (2, 2)), frame))


def boxes_out_of_view(boxes: Tensor, frame: Tensor) -> Tensor:
    """The inverse of `boxes_into_view`."""
    return _ordered(out_of_view(boxes.unflatten(1, (2, 2)), frame))


def _ordered(corners: Tensor) -> Tensor:
    """Two corners each [n, 2, 2] -> [n, 4], the smaller coordinates first."""
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)
