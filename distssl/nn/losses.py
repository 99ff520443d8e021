"""Losses of two views' embeddings.

Each takes this rank's tensors and returns what, after DDP's mean over ranks, gives the gradient of the global batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import collectives


def nt_xent(za: Tensor, zb: Tensor, temperature: float = 0.1) -> Tensor:
    """The normalised, temperature-scaled cross-entropy of SimCLR, eq. 1, averaged over this rank's 2N anchors.

    An anchor's positive is the other view of its image, its negatives are both views of every other image on every
    rank: of the 2B embeddings only the anchor itself is left out. `za` and `zb` [N, D] are float, not normalised,
    N is the same on every rank. The result is a scalar, float64 for float64 and float32 for anything else.

    Chen, Kornblith, Norouzi and Hinton, A Simple Framework for Contrastive Learning of Visual Representations,
    ICML 2020, https://arxiv.org/abs/2002.05709. Deviation: the published code adds the means over the anchors of
    each view, twice this; the equation averages over all 2N.
    """
    with torch.autocast(za.device.type, enabled=False):
        dtype = torch.promote_types(za.dtype, torch.float32)
        z = F.normalize(torch.cat([za, zb]).to(dtype), dim=1)  # [2N, D]
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
