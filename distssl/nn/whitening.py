"""Iterative normalisation: features whitened over the global batch by Newton's iterations, without an eigensolver.

Huang, Zhou, Zhu, Liu and Shao, Iterative Normalization: Beyond Standardization towards Efficient Whitening, CVPR 2019,
https://arxiv.org/abs/1904.03441, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distssl import collectives
from distssl.nn import moments


class IterNorm(nn.Module):
    """[N, D] float -> [N, D]: each of `num_groups` runs of D / num_groups features becomes approximately white.

    In training the mean and covariance are the global batch's, differentiable; running ones serve in evaluation.
    `iterations` is the paper's T. Raises ValueError where num_groups does not divide num_features.
    """

    running_mean: Tensor
    running_whitening: Tensor

    def __init__(
        self, num_features: int, num_groups: int = 64, iterations: int = 5, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__()
        if num_features % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide num_features={num_features}")
        self.num_groups, self.iterations, self.eps, self.momentum = num_groups, iterations, eps, momentum
        size = num_features // num_groups
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_whitening", torch.eye(size).repeat(num_groups, 1, 1))  # [G, D/G, D/G]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.training:
                mean, count = moments.mean(wide)
                grouped = self._grouped(wide - mean)  # [G, N, D/G]
                covariance = collectives.all_reduce(grouped.mT @ grouped) / count  # [G, D/G, D/G]
                whitening = self._whitening(covariance)
                self._track(mean, whitening)
            else:
                grouped = self._grouped(wide - self.running_mean)
                whitening = self.running_whitening
            white = (grouped @ whitening).transpose(0, 1).flatten(1)  # [N, D]; whitening is symmetric
            return white * self.weight + self.bias

    def _grouped(self, x: Tensor) -> Tensor:
        """[N, D] -> [G, N, D/G]."""
        return x.unflatten(1, (self.num_groups, -1)).transpose(0, 1)

    def _whitening(self, covariance: Tensor) -> Tensor:
        """The inverse square root of [G, d, d], nearly: Newton's iterations on the matrix over its trace."""
        eye = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
        covariance = covariance + self.eps * eye
        trace = covariance.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]  # [G, 1, 1]
        scaled = covariance / trace
        p = eye.expand_as(scaled)
        for _ in range(self.iterations):
            p = (3 * p - p @ p @ p @ scaled) / 2
        return p * trace.rsqrt()

    @torch.no_grad()
    def _track(self, mean: Tensor, whitening: Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_whitening.lerp_(whitening.to(self.running_whitening.dtype), self.momentum)
