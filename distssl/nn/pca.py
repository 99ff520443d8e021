"""Whitening by principal components over all ranks, as DeepCluster puts it before its k-means.

    y = diag(lambda)^(-1/2) V^T (x - mean)

lambda, V the largest eigenvalues and their vectors of the covariance of all ranks' rows. Caron et al., Deep Clustering
for Unsupervised Learning of Visual Features, ECCV 2018, section 3.3, and its code (PCA with eigen_power -0.5).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distssl import collectives

AT_ONCE = 8192  # rows in float64


class Whitening(nn.Module):
    """[n, D] -> [n, d], fitted by `fit`; what it found is in checkpoints, so new images can be compared with old ones.

    A component with no variance but rounding's is left out: its column is 0 instead of noise blown up to variance 1.
    """

    mean: Tensor
    components: Tensor

    def __init__(self, num_features: int, num_components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("components", torch.zeros(num_features, num_components))  # [D, d]

    @torch.no_grad()
    def fit(self, x: Tensor) -> int:
        """Find the components of all ranks' rows, of which `x` float [n, D] is this rank's, n as it likes.

        Returns how many components are left out. Sums are float64. Raises ValueError, on every rank, for rows that are
        not finite and for constant ones.
        """
        wide = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        sums = torch.stack([wide, wide])
        for part in x.split(AT_ONCE):
            sums += torch.stack([part.double().sum(0), part.double().square().sum(0)])
        count = collectives.sum_(torch.tensor(float(len(x)), dtype=torch.float64, device=x.device))
        mean, squares = collectives.sum_(sums) / count  # [D] each
        if not (mean.isfinite().all() and squares.isfinite().all()):
            raise ValueError("features are NaN or infinite")
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=x.device)
        for part in x.split(AT_ONCE):
            centred = part.double() - mean
            covariance += centred.T @ centred
        covariance = collectives.sum_(covariance) / count
        rounding = (8 * torch.finfo(x.dtype).eps) ** 2 * float(squares.max())  # the variance of a constant
        return self._decompose(mean, covariance, rounding)

    def _decompose(self, mean: Tensor, covariance: Tensor, rounding: float) -> int:
        num = self.components.shape[1]
        values, vectors = torch.linalg.eigh(covariance)  # ascending
        largest_first = values.flip(0)[:num].cpu(), vectors.flip(1)[:, :num].contiguous().cpu()
        # Of rank 0, should ranks' machines round differently.
        values, vectors = (part.to(mean) for part in collectives.broadcast_object(largest_first))
        nothing = max(rounding, float(values[0]) * len(mean) * torch.finfo(torch.float64).eps)
        kept = values > nothing
        if not kept.any():
            raise ValueError(
                f"constant features: no component varies by more than rounding does (variance {float(values[0]):.1e})"
            )
        # A vector's sign is arbitrary: its largest entry is made positive.
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        scale = torch.where(kept, values.clamp_min(nothing).rsqrt(), 0.0) * largest[0].sign()
        self.mean.copy_(mean)
        self.components.copy_(vectors * scale)
        return int((~kept).sum())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, d] of the same dtype."""
        mean, components = self.mean.double(), self.components.double()
        return torch.cat([((part.double() - mean) @ components).to(x.dtype) for part in x.split(AT_ONCE)])
