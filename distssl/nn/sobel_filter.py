"""The fixed edge filter that classic pretext methods put before a backbone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sobel(nn.Module):
    """Images [N, 3, H, W] -> [N, 2, H, W]: the grey image's slopes to the right and downwards, by fixed kernels.

    DeepCluster's input: without colour clusters are not of colour (Caron et al., ECCV 2018, section 3.3, and its code).
    Grey is the mean of the channels. Nothing of it is trained or in a state_dict.
    """

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        right = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("kernels", torch.stack([right, right.T])[:, None], persistent=False)  # [2, 1, 3, 3]

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.mean(1, keepdim=True), self.kernels, padding=1)
