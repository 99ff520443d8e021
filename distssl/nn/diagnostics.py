"""What tells a healthy embedding from a collapsed one, from two views' embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_RANKED = 1024  # images: a log line must not wait for the spectrum of a batch of thousands


@torch.no_grad()
def of_embeddings(za: Tensor, zb: Tensor) -> dict[str, Tensor]:
    """Scalars of `za` and `zb` [N, D] float, the embeddings of two views of the same N images, N at least 2.

    The tensors given are the whole sample: gather them first where the numbers should not depend on the world size.

    - embedding_std: the standard deviation of z/|z| in a dimension, averaged over dimensions, times sqrt(D):
      1 when the directions are spread evenly, 0 when they are all the same (Chen and He, Exploring Simple Siamese
      Representation Learning, CVPR 2021; they plot it without the factor).
    - effective_rank: exp of the entropy of the singular values, 1 to D (Garrido et al., RankMe, ICML 2023, eq. 1); of
      the first MOST_RANKED images.
    - alignment: the mean of |za - zb|^2 over the pairs, of unit vectors, 0 to 4; uniformity: the log of the mean of
      exp(-2 |x - y|^2) over all pairs of a view, 0 when collapsed, less is more uniform (Wang and Isola,
      Understanding Contrastive Representation Learning, ICML 2020, section 4, alpha = 2 and t = 2).

    The first two are of the embeddings of both views, the last is the mean of the two. float64 for float64, else
    float32.
    """
    with torch.autocast(za.device.type, enabled=False):
        dtype = torch.promote_types(za.dtype, torch.float32)
        za, zb = za.to(dtype), zb.to(dtype)
        a, b = F.normalize(za, dim=1), F.normalize(zb, dim=1)
        return {
            "embedding_std": torch.cat([a, b]).std(0, correction=0).mean() * za.shape[1] ** 0.5,
            "effective_rank": effective_rank(torch.cat([za[:MOST_RANKED], zb[:MOST_RANKED]])),
            "alignment": (a - b).square().sum(1).mean(),
            "uniformity": (_uniformity(a) + _uniformity(b)) / 2,
        }


def effective_rank(z: Tensor) -> Tensor:
    """RankMe of [N, D] float: exp of the entropy of the singular values, 1 to min(N, D)."""
    dtype = z.dtype
    z = z.double()
    gram = z.T @ z if len(z) > z.shape[1] else z @ z.T  # much less work than the singular values of a large z
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum() + 1e-7  # the paper's epsilon
    return torch.exp(-(p * p.log()).sum()).to(dtype)


def _uniformity(z: Tensor) -> Tensor:
    squared = F.pdist(z).square()  # [N (N - 1) / 2]
    return torch.logsumexp(-2 * squared, 0) - torch.log(squared.new_tensor(len(squared)))
