"""Losses of two views' embeddings: `za` and `zb` [N, D], float, of this rank, not normalised, N the same on all ranks.

Each returns a scalar that, after DDP's mean over ranks, gives the gradient of the global batch: a mean over this rank's
images, or a number of the whole batch that is the same on every rank. All compute in float32, in float64 for float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import collectives
from distssl.nn import moments
from distssl.nn.precision import full_precision


@full_precision
def nt_xent(za: Tensor, zb: Tensor, temperature: float = 0.1) -> Tensor:
    """The normalised, temperature-scaled cross-entropy of SimCLR, eq. 1, averaged over this rank's 2N anchors.

    An anchor's positive is the other view of its image, its negatives are both views of every other image on every
    rank: of the 2B embeddings only the anchor itself is left out.

    Chen, Kornblith, Norouzi and Hinton, A Simple Framework for Contrastive Learning of Visual Representations,
    ICML 2020, https://arxiv.org/abs/2002.05709. Deviation: the published code adds the means over the anchors of
    each view, twice this; the equation averages over all 2N.
    """
    z = F.normalize(torch.cat([za, zb]), dim=1)  # [2N, D]
    keys = collectives.gather(z)  # [2B, D], rank after rank
    anchors = torch.arange(z.shape[0], device=z.device)
    positives = anchors.roll(z.shape[0] // 2)
    positive = (z * z[positives]).sum(1) / temperature  # [2N]

    offset = collectives.rank() * z.shape[0]
    similarity = (z / temperature) @ keys.T  # [2N, 2B]
    similarity[anchors, offset + anchors] = -torch.inf
    similarity[anchors, offset + positives] = -torch.inf
    negatives = similarity.logsumexp(1)  # [2N]
    # -log(e^p / (e^p + Z)) = log(1 + Z / e^p). The left form cancels to 0 once p is far above the negatives, as it
    # is at temperatures of 0.02, and takes the gradient with it. torch's default threshold of 20 is f32's.
    return F.softplus(negatives - positive, threshold=40).mean()


@full_precision
def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """MoCo's eq. 1: each query's key against `negatives`, averaged over this rank's N queries.

    queries, keys [N, D] and negatives [M, D], which are normalised here; each key is its query's positive.

    He, Fan, Wu, Xie and Girshick, Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020,
    https://arxiv.org/abs/1911.05722.
    """
    q, k, others = (F.normalize(x, dim=1) for x in (queries, keys, negatives))
    positive = (q * k).sum(1) / temperature  # [N]
    return F.softplus((q @ others.T / temperature).logsumexp(1) - positive, threshold=40).mean()


@full_precision
def in_batch(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each query finding its own key among those of the global batch, averaged over N queries.

    queries [N, D] of this rank, keys [B, D] of all ranks in rank order; both are normalised here.

    Chen, Xie and He, An Empirical Study of Training Self-Supervised Vision Transformers (MoCo v3), ICCV 2021,
    algorithm 1, https://arxiv.org/abs/2104.02057.
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature  # [N, B]
    own = collectives.rank() * len(queries) + torch.arange(len(queries), device=queries.device)
    return F.cross_entropy(similarity, own)


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
