"""Retrieval with frozen features: are the images most like a query of its class?

Queries are the test images, the gallery the training images. recall@k is the share of queries with at least one image
of their class among the k nearest (Jegou, Douze, Schmid, Product Quantization for Nearest Neighbor Search, PAMI 2011;
in information retrieval it is called hit rate), mAP the mean over queries of the average precision of the whole
ranking. Both are exact; the gallery is read by blocks, so memory does not grow with it.
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


def retrieve(gallery: Features, queries: Features, context: Context) -> dict[str, float]:
    """recall_at_1, 5, 10 and map. Queries whose class is not in the gallery are left out. Every rank calls it."""
    mean, labels = gallery.mean(), torch.from_numpy(gallery.labels)
    found = torch.zeros(len(CUTOFFS) + 2, dtype=torch.float64)  # hits, the sum of average precisions, queries
    for first, block in blocks_of_rank(queries, context):
        truth = torch.from_numpy(queries.labels[first : first + len(block)])
        block = F.normalize(block - mean, dim=1)
        _, nearest = nearest_of(block, gallery, mean, max(CUTOFFS))
        hits = labels[nearest] == truth[:, None]  # [q, k]
        precision = average_precision(block, truth, gallery, mean)
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
    similarities = [_of_class(queries, truth, block, mean, gallery, first) for first, block in gallery.blocks()]
    most = max(found.shape[1] for found in similarities)
    right = torch.cat(similarities, dim=1).sort(dim=1, descending=True).values if most else torch.empty(len(queries), 0)
    right = right[:, : int((right > -torch.inf).sum(1).max())].contiguous()  # [q, P], -inf behind a query's last
    above = torch.zeros(right.shape, dtype=torch.float64)  # images of other classes, above each
    rising = right.flip(1).contiguous()
    for first, block in gallery.blocks():
        others = queries @ F.normalize(block - mean, dim=1).T  # [q, n]
        others[truth[:, None] == _labels(gallery, first, block)] = -torch.inf
        place = torch.searchsorted(
            rising, others.contiguous(), right=True
        )  # of those of its class below or level with it
        counts = torch.zeros(len(queries), right.shape[1] + 1, dtype=torch.float64)
        counts.scatter_add_(1, place, torch.ones_like(others, dtype=torch.float64) * (others > -torch.inf))
        above += counts.flip(1).cumsum(1)[:, : right.shape[1]]
    rank_in_class = torch.arange(1, right.shape[1] + 1, dtype=torch.float64)
    there = right > -torch.inf
    return (rank_in_class / (rank_in_class + above) * there).sum(1) / there.sum(1).clamp_min(1)


def _of_class(queries: Tensor, truth: Tensor, block: Tensor, mean: Tensor, gallery: Features, first: int) -> Tensor:
    """Similarities of the block's images of each query's class, [q, P'], -inf where it has fewer than another."""
    similarity = queries @ F.normalize(block - mean, dim=1).T  # [q, n]
    similarity[truth[:, None] != _labels(gallery, first, block)] = -torch.inf
    most = int((similarity > -torch.inf).sum(1).max())
    return similarity.topk(most, dim=1).values


def _labels(gallery: Features, first: int, block: Tensor) -> Tensor:
    return torch.from_numpy(gallery.labels[first : first + len(block)])
