"""Decoders: from a backbone's feature map back to images."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Decoder(nn.Module):
    """[N, channels, h, w] -> [N, out_channels, S, S]: bilinear upsampling, 3x3 convolution, BatchNorm, ReLU for each
    of the widths, then a 1x1 convolution.

    The sides grow by equal factors, whatever the map's is and whether or not S is a multiple of it.
    """

    def __init__(self, channels: int, widths: Sequence[int], out_channels: int) -> None:
        super().__init__()
        before = [channels, *widths[:-1]]
        self.blocks = nn.ModuleList(_block(i, o) for i, o in zip(before, widths, strict=True))
        self.last = nn.Conv2d(widths[-1], out_channels, 1)

    def forward(self, x: Tensor, size_px: int) -> Tensor:
        height, width = x.shape[2:]
        for number, block in enumerate(self.blocks, 1):
            share = number / len(self.blocks)
            size = [round(side * (size_px / side) ** share) for side in (height, width)]
            x = block(F.interpolate(x, size=size, mode="bilinear", align_corners=False))
        return self.last(x)  # [N, out_channels, S, S]


def _block(channels: int, width: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
