"""The losses of benchmarks/nt_xent.py as they are usually written, with the whole matrix of similarities."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from distssl.methods import segsort


def nt_xent(za: Tensor, zb: Tensor, temperature: float) -> Tensor:
    z = F.normalize(torch.cat([za, zb]), dim=1)
    similarity = z @ z.T / temperature
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(za)))


def lightly_nt_xent(za: Tensor, zb: Tensor, temperature: float) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightly.loss import NTXentLoss
    return NTXentLoss(temperature)(za, zb)


def exact_nt_xent(za: Tensor, zb: Tensor, temperature: float) -> Tensor:
    """In float64, and as log(1 + negatives / positive): what float64 inputs do not save is the cancellation."""
    z = F.normalize(torch.cat([za, zb]).double(), dim=1)
    anchors = torch.arange(len(z))
    positives = anchors.roll(len(za))
    similarity = z @ z.T / temperature
    positive = similarity[anchors, positives]
    hidden = torch.zeros_like(similarity, dtype=torch.bool)
    hidden[anchors, anchors] = hidden[anchors, positives] = True
    return torch.log1p((similarity.masked_fill(hidden, -torch.inf).logsumexp(1) - positive).exp()).mean()


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    q, k, others = (F.normalize(x, dim=1) for x in (queries, keys, negatives))
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ others.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


def in_batch(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    similarity = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    return F.cross_entropy(similarity, torch.arange(len(queries)))


def neighbourhood_loss(v: Tensor, own: Tensor, prototypes: Tensor, kinds: Tensor, concentration: float) -> Tensor:
    """SegSort's, of places that all have a segment."""
    mine = F.one_hot(own, len(prototypes)).bool()
    same = kinds[own][:, None] == kinds
    others = same & ~mine
    near = torch.where(others.any(1, keepdim=True), others, mine)
    counted = near | (~same & (kinds != segsort.NONE))
    e = concentration * v @ prototypes.T
    sums = [e.masked_fill(~chosen, -torch.inf).logsumexp(1) for chosen in (counted, near)]
    return (sums[0] - sums[1]).sum()
