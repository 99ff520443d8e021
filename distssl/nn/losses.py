"""Losses of two views' embeddings: `za` and `zb` [N, D], float, of this rank, not normalised, N the same on all ranks.

Each returns a scalar that, after DDP's mean over ranks, gives the gradient of the global batch: a mean over this rank's
images, or a number of the whole batch that is the same on every rank. All compute in float32, in float64 for float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import collectives
from distssl.nn import contrastive, moments
from distssl.nn.precision import full_precision


def nt_xent(
    za: Tensor, zb: Tensor, temperature: float = 0.1, *, ring: bool = False, sizes: Sequence[int] | None = None
) -> Tensor:
    """The normalised, temperature-scaled cross-entropy of SimCLR, eq. 1, averaged over this rank's 2N anchors.

    An anchor's positive is the other view of its image, its negatives are both views of every other image on every
    rank: of the 2B embeddings only the anchor itself is left out. Memory grows with B, not its square, and with
    `ring` with N; N may differ between ranks if `sizes` tells all of them: see contrastive.nt_xent.

    Chen, Kornblith, Norouzi and Hinton, A Simple Framework for Contrastive Learning of Visual Representations,
    ICML 2020, https://arxiv.org/abs/2002.05709. Deviation: the published code adds the means over the anchors of
    each view, twice this; the equation averages over all 2N.
    """
    return contrastive.nt_xent(torch.stack([za, zb], dim=1), temperature, ring, sizes)


@full_precision
def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """MoCo's eq. 1: each query's key against `negatives`, averaged over this rank's N queries.

    queries, keys [N, D] and negatives [M, D], which are normalised here; each key is its query's positive.

    He, Fan, Wu, Xie and Girshick, Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020,
    https://arxiv.org/abs/1911.05722.
    """
    q, k, others = (F.normalize(x, dim=1) for x in (queries, keys, negatives))
    (far,) = contrastive.exp_sums(q, others, temperature)  # [N]
    return _share(q, k, far, temperature)


@full_precision
def in_batch(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each query finding its own key among those of the global batch, averaged over N queries.

    queries [N, D] of this rank, keys [B, D] of all ranks in rank order; both are normalised here.

    Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers (MoCo v3), ICCV 2021,
    algorithm 1, https://arxiv.org/abs/2104.02057.
    """
    q, k = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    first = collectives.rank() * len(q)
    numbers = torch.arange(len(k), device=k.device, dtype=q.dtype)
    own = numbers[first : first + len(q)]
    (far,) = contrastive.exp_sums(q, k, temperature, lambda i, j: [contrastive.different(own[i], numbers[j])])  # [N]
    return _share(q, k[first : first + len(q)], far, temperature)


def _share(q: Tensor, k: Tensor, far: Tensor, temperature: float) -> Tensor:
    """-log of the share of e^(q k / temperature) in itself and `far` [N], averaged. q, k: unit vectors [N, D]."""
    near = ((q * k).sum(1).double() / temperature).exp()  # [N]
    return torch.log1p(far / near).mean().to(q.dtype)


def classification(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """ "loss", the mean cross-entropy of logits [N, K] and labels int64 [N], and "accuracy" in 0..1, of this rank."""
    return {
        "loss": F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels),
        "accuracy": (logits.argmax(1) == labels).double().mean(),
    }


@full_precision
def soft_cross_entropy(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """-mean over N of sum_k targets_k log softmax(scores / temperature)_k; scores and targets [N, K]."""
    return -(targets * F.log_softmax(scores / temperature, dim=1)).sum(1).mean()


@full_precision
def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """SimSiam's eq. 1, -mean cos(p, z), in [-1, 1]; stop z's gradient before where the method does.

    Chen and He, Exploring Simple Siamese Representation Learning, CVPR 2021, https://arxiv.org/abs/2011.10566. BYOL's
    eq. 2 is 2 + 2 times this.
    """
    return -F.cosine_similarity(p, z, dim=1).mean()


@full_precision
def barlow_twins(za: Tensor, zb: Tensor, off_diagonal: float = 0.0051) -> Tensor:
    """The cross-correlation of the two views' embeddings against the identity; of the global batch.

    sum_i (1 - C_ii)^2 + off_diagonal * sum_{i != j} C_ij^2, C = the correlation of za's feature i with zb's feature j.

    Zbontar, Jing, Misra, LeCun and Deny, Barlow Twins, ICML 2021, https://arxiv.org/abs/2103.03230. The standardised
    embeddings are a BatchNorm's without weights (eps 1e-5), as in the published code.
    """
    a, b = moments.standardise(za), moments.standardise(zb)
    c = moments.mean_product(a, b)  # [D, D]
    on = (1 - c.diagonal()).square().sum()
    return on + off_diagonal * _off_diagonal(c).square().sum()


@full_precision
def vicreg(za: Tensor, zb: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> Tensor:
    """Distance of the views, a hinge on each feature's deviation, and covariances towards 0.

    The invariance term is of this rank's images, the other two of the global batch. Deviation from the paper's eq. 6,
    as the published code whose numbers are cited: the two views' variance terms are averaged, not summed.

    Bardes, Ponce and LeCun, VICReg, ICLR 2022, https://arxiv.org/abs/2105.04906.
    """
    total = invariance * F.mse_loss(za, zb)
    for z in (za, zb):
        cov = moments.covariance(z)  # [D, D], unbiased
        total = total + variance * _hinge(cov.diagonal()) / 2
        total = total + covariance * _off_diagonal(cov).square().sum() / z.shape[1]
    return total


@full_precision
def vibcreg(
    za: Tensor, zb: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 200.0
) -> Tensor:
    """VICReg with correlations in place of covariances: they do not depend on the features' scale.

    The variance terms are summed and the squared correlations averaged over D^2, as the published code does.

    Lee and Aune, Computer Vision Self-supervised Learning Methods on Time Series (VIbCReg), 2021,
    https://arxiv.org/abs/2109.00783.
    """
    total = invariance * F.mse_loss(za, zb)
    for z in (za, zb):
        cov = moments.covariance(z)  # [D, D]
        total = total + variance * _hinge(cov.diagonal())
        # Features normalised over the batch to length 1: their products are correlations.
        scale = cov.diagonal().clamp_min(1e-12).rsqrt()
        total = total + covariance * _off_diagonal(cov * scale[:, None] * scale).square().sum() / z.shape[1] ** 2
    return total


def _hinge(variances: Tensor) -> Tensor:
    """[D] -> mean of max(0, 1 - deviation)."""
    return F.relu(1 - (variances + 1e-4).sqrt()).mean()


def _off_diagonal(square: Tensor) -> Tensor:
    """[D, D] -> [D, D] with zeros on the diagonal."""
    return square - torch.diag(square.diagonal())
