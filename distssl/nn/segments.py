"""Segments of an image: k-means over its places, and the mean embedding of each segment.

Everything is an image's own, so no result depends on the batch or on the ranks. N images, P places (h * w, row by
row), D dimensions, S segments an image; a place's segment is 0 .. S - 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distssl.nn.precision import full_precision


def locations(height: int, width: int, like: Tensor) -> Tensor:
    """Places' coordinates, each side from -1 to 1: [P, 2] of like's dtype and device."""
    y = torch.linspace(-1, 1, height, dtype=like.dtype, device=like.device)
    x = torch.linspace(-1, 1, width, dtype=like.dtype, device=like.device)
    return torch.cartesian_prod(y, x)


def grid(height: int, width: int, side: int, device: torch.device) -> Tensor:
    """The segments k-means starts from, side x side blocks of places: int64 [P]."""
    rows = torch.arange(height, device=device) * side // height
    columns = torch.arange(width, device=device) * side // width
    return (rows[:, None] * side + columns).flatten()


@torch.no_grad()
@full_precision
def kmeans(x: Tensor, start: Tensor, num_segments: int, iterations: int, *, spherical: bool) -> Tensor:
    """Lloyd's iterations in each image by itself: int64 [N, P], the places' segments.

    x: float [N, P, D]. start: int64 [P]. spherical: centroids of length 1 and the largest product in place of the
    smallest distance, for rows of length 1. In float32 at least. A segment that loses its places keeps none.
    """
    segments = start.expand(len(x), -1)
    for _ in range(iterations):
        centroids, counts = means(x, segments, num_segments)  # [N, S, D], [N, S]
        if spherical:
            similarity = x @ F.normalize(centroids, dim=2).mT  # [N, P, S]
        else:
            similarity = x @ centroids.mT - centroids.square().sum(2)[:, None] / 2
        segments = similarity.masked_fill(counts[:, None] == 0, -torch.inf).argmax(2)
    return segments


@full_precision
def means(x: Tensor, segments: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """The mean of each segment's rows, 0 where it has none, and how many it has: [N, S, D] and [N, S].

    x: float [N, P, D]. segments: int64 [N, P]; places of a negative segment belong to none. In float32 at least.
    """
    member = F.one_hot(segments.clamp_min(0), num_segments).to(x.dtype) * (segments >= 0)[..., None]  # [N, P, S]
    counts = member.sum(1)  # [N, S]
    return member.mT @ x / counts.clamp_min(1)[..., None], counts


def numbered(pairs: Tensor, most: int) -> Tensor:
    """Arbitrary ids [N, P] (int64, negative: none) as segments 0 .. most - 1 of each image, its largest ones first.

    Of segments of one size the smaller id comes first. Places of further segments become -1.
    """
    found = torch.full_like(pairs, -1)
    for image, ids in enumerate(pairs):
        different, counts = ids[ids >= 0].unique(return_counts=True)
        for number, nth in enumerate(torch.argsort(counts, descending=True, stable=True)[:most].tolist()):
            found[image][ids == different[nth]] = number
    return found
