"""Two views of a batch for tests of losses over ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def problem(images: int, inputs: int, outputs: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two views of a batch in an order (a drift along it, so that each rank's slice differs), and an encoder; float64.

    [images, inputs] twice and [inputs, outputs], whose entries have the deviation `scale`.
    """
    generator = torch.Generator().manual_seed(0)
    xa = torch.randn(images, inputs, generator=generator, dtype=torch.float64)
    xa += torch.linspace(-2, 2, images, dtype=torch.float64)[:, None]
    xb = xa + 0.3 * torch.randn(images, inputs, generator=generator, dtype=torch.float64)
    return xa, xb, scale * torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)


def error(of: Tensor, exact: Tensor) -> float:
    """|of - exact| / |exact|."""
    return float((of.double() - exact).norm() / exact.norm())
