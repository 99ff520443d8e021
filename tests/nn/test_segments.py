"""Segments: k-means against scikit-learn's and by hand, means against numpy's, numbers by size."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from distssl.nn import segments


def test_kmeans_is_scikit_learns_from_the_same_start() -> None:
    x = torch.randn(3, 64, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = segments.grid(8, 8, 2, x.device)
    found = segments.kmeans(x, start, 4, 5, spherical=False)
    for image, labels in zip(x.numpy(), found.numpy(), strict=True):
        centres = np.stack([image[start.numpy() == s].mean(0) for s in range(4)])
        # scikit-learn assigns once more after its last update of the centres.
        theirs = KMeans(4, init=centres, n_init=1, max_iter=4, tol=0).fit(image).labels_
        assert (labels == theirs).all()


def test_spherical_kmeans_parts_directions_and_not_lengths() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 1.5, 1.6, 1.7], dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    found = segments.kmeans(x, torch.tensor([0, 1, 0, 1, 0, 1]), 2, 5, spherical=True)[0]
    assert found[:3].unique().numel() == found[3:].unique().numel() == 1
    assert found[0] != found[3]


def test_a_segment_that_lost_its_places_stays_empty() -> None:
    x = torch.zeros(1, 4, 2, dtype=torch.float64)
    found = segments.kmeans(x, torch.tensor([2, 2, 1, 1]), 3, 3, spherical=False)
    assert set(found[0].tolist()) <= {1, 2}


def test_means_are_of_a_segments_own_places() -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    segment = torch.tensor([[0, 0, 1, -1, 1, 1], [2, 2, 2, 2, -1, 0]])
    means, counts = segments.means(x, segment, 4)
    assert counts.tolist() == [[2, 3, 0, 0], [1, 0, 4, 0]]
    torch.testing.assert_close(means[0, 1], x[0, [2, 4, 5]].mean(0))
    torch.testing.assert_close(means[1, 2], x[1, :4].mean(0))
    assert not means[0, 2:].any()


def test_segments_are_numbered_by_size_and_the_smallest_left_out() -> None:
    ids = torch.tensor([[7, 7, 300, 300, 300, 5, -1], [4, 4, 2, 2, 9, 9, 9]])
    assert segments.numbered(ids, 2).tolist() == [[1, 1, 0, 0, 0, -1, -1], [-1, -1, 1, 1, 0, 0, 0]]


def test_the_start_is_blocks_of_the_image() -> None:
    start = segments.grid(6, 9, 3, torch.device("cpu")).view(6, 9)
    assert start[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert start[:, 0].tolist() == [0, 0, 3, 3, 6, 6]
    places = segments.locations(6, 9, torch.zeros(1)).view(6, 9, 2)
    torch.testing.assert_close(places[0, 0], torch.tensor([-1.0, -1.0]))
    torch.testing.assert_close(places[5, 8], torch.tensor([1.0, 1.0]))
    assert F.normalize(places[2, 3], dim=0).isfinite().all()


def test_segments_are_the_same_under_autocast() -> None:
    x = 100 * torch.rand(2, 64, 5, generator=torch.Generator().manual_seed(0))
    start = segments.grid(8, 8, 3, x.device)
    with torch.autocast("cpu", torch.bfloat16):
        found = segments.kmeans(x, start, 9, 5, spherical=False)
        means, _ = segments.means(x, found, 9)
    assert torch.equal(found, segments.kmeans(x, start, 9, 5, spherical=False))
    assert torch.equal(means, segments.means(x, found, 9)[0])
