"""Retrieval with frozen features: are the images most like a query of its class?

Queries are the test images, the gallery the training images. recall@k is the share of queries with at least one image
of their class among the k nearest (Jegou, Douze, Schmid, Product Quantization for Nearest Neighbor Search, PAMI 2011;
in information retrieval it is called hit rate), mAP the mean over queries of the average precision of the whole
ranking. Both are exact. The gallery is read by blocks, and what is kept of it, the similarities of queries to images of
their class, is at most MOST_KEPT numbers: where classes are large, fewer queries are ranked at a time.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import collectives
from distssl.context import Context
from distssl.downstream.classify import blocks_of_rank, nearest_of
from distssl.downstream.features import Features

log = logging.getLogger(__name__)

CUTOFFS = (1, 5, 10)
MOST_KEPT = 1 << 24  # similarities of queries to images of their class: about 1 GB with what is computed of them


def retrieve(gallery: Features, queries: Features, context: Context) -> dict[str, float]:
    """recall_at_1, 5, 10 and map. Queries whose class is not in the gallery are left out. Every rank calls it."""
    mean, labels = gallery.mean(), torch.from_numpy(gallery.labels)
    at_once = max(1, MOST_KEPT // int(labels.bincount().max()))  # queries
    found = torch.zeros(len(CUTOFFS) + 2, dtype=torch.float64)  # hits, the sum of average precisions, queries
    for first, block in blocks_of_rank(queries, context):
        truth = torch.from_numpy(queries.labels[first : first + len(block)])
        block = F.normalize(block - mean, dim=1)
        _, nearest = nearest_of(block, gallery, mean, max(CUTOFFS))
        hits = labels[nearest] == truth[:, None]  # [q, k]
        parts = zip(block.split(at_once), truth.split(at_once), strict=True)
        precision = torch.cat([average_precision(*part, gallery, mean) for part in parts])
        counts = torch.isin(truth, labels)
        found[:-2] += torch.stack([hits[counts, :k].any(1).sum() for k in CUTOFFS])
        found[-2] += precision[counts].sum()
        found[-1] += counts.sum()
    *sums, total = collectives.sum_(found).tolist()
    if total < len(queries) and context.rank == 0:
        log.warning(
            "retrieval: %d of %d queries have no image of their class to find", len(queries) - total, len(queries)
        )
    shares = [value / max(total, 1) for value in sums]
    return dict(zip((*(f"recall_at_{k}" for k in CUTOFFS), "map"), shares, strict=True))


def average_precision(queries: Tensor, truth: Tensor, gallery: Features, mean: Tensor) -> Tensor:
    """Average precision of the gallery's whole ranking for each query, float64 [q]; 0 without an image of its class.

    queries: unit rows [q, D]; truth: their classes, int64 [q]. The gallery is read twice: for the similarities of the
    images of a query's class, then to count what is ranked above each of them. Of other images as similar as one of its
    class all count as above it.
    """
    right = _of_their_class(queries, truth, gallery, mean)  # [q, P]
    rising = right.flip(1).contiguous()
    others_at = torch.zeros(len(queries), right.shape[1] + 1, dtype=torch.float64)  # by the number of `right` below
    for first, block in gallery.blocks():
        others = queries @ F.normalize(block - mean, dim=1).T  # [q, n]
        others[truth[:, None] == _labels(gallery, first, block)] = -torch.inf
        place = torch.searchsorted(rising, others.contiguous(), right=True)  # of those of its class below or level
        others_at.scatter_add_(1, place, torch.ones_like(others, dtype=torch.float64) * (others > -torch.inf))
    above = others_at.flip(1).cumsum(1)[:, : right.shape[1]]  # images of other classes, above each
    rank_in_class = torch.arange(1, right.shape[1] + 1, dtype=torch.float64)
    there = right > -torch.inf
    return (rank_in_class / (rank_in_class + above) * there).sum(1) / there.sum(1).clamp_min(1)


def _of_their_class(queries: Tensor, truth: Tensor, gallery: Features, mean: Tensor) -> Tensor:
    """Similarities of the images of each query's class, [q, P], falling; -inf behind a query's last."""
    sizes = torch.from_numpy(gallery.labels).bincount(minlength=int(truth.max()) + 1)
    found = torch.full((len(queries), int(sizes[truth].max())), -torch.inf)
    filled = torch.zeros(len(queries), 1, dtype=torch.int64)
    for first, block in gallery.blocks():
        same = truth[:, None] == _labels(gallery, first, block)  # [q, n]
        query, row = same.nonzero(as_tuple=True)
        place = (filled + same.cumsum(1) - 1)[query, row]
        found[query, place] = (queries @ F.normalize(block - mean, dim=1).T)[query, row]
        filled += same.sum(1, keepdim=True)
    return found.sort(dim=1, descending=True).values


def _labels(gallery: Features, first: int, block: Tensor) -> Tensor:
    return torch.from_numpy(gallery.labels[first : first + len(block)])
