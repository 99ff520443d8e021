"""A fully convolutional head over feature maps: each is projected, all are summed at the largest one's size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_WIDTH, MOST_WIDTH = 32, 128


class SkipHead(nn.Module):
    """Feature maps -> [N, C_out, h, w] at the size of the largest map.

    Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation. CVPR 2015,
    https://arxiv.org/abs/1411.4038, section 4.2; the projections have an eighth of the last map's channels instead of
    one a class, and a 3x3 convolution follows their sum, as in Kirillov et al., Panoptic Feature Pyramid Networks, CVPR
    2019, https://arxiv.org/abs/1901.02446.
    """

    def __init__(self, channels: list[int], out_channels: int) -> None:
        super().__init__()
        width = min(MOST_WIDTH, max(LEAST_WIDTH, channels[-1] // 8))
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(num, width, 1, bias=False), nn.BatchNorm2d(width)) for num in channels
        )
        self.mix = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.out = nn.Sequential(nn.ReLU(), nn.Conv2d(width, out_channels, 1))

    def start_from(self, value: float) -> None:
        """Let the untrained head give about this."""
        nn.init.constant_(self.out[-1].bias, value)  # pyright: ignore[reportArgumentType]

    def forward(self, maps: list[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        parts = [project(x) for project, x in zip(self.projections, maps, strict=True)]
        y = torch.stack([F.interpolate(x, size, mode="bilinear") for x in parts]).sum(0)
        return self.out(self.mix(y))
