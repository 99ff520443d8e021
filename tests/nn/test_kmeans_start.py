from __future__ import annotations

import numpy as np
import torch

from distssl.nn import kmeans_start
from distssl.nn.rows import Rows


def draw(name: str, x: torch.Tensor, k: int, seed: int) -> torch.Tensor:
    return kmeans_start.draw(name, Rows(x), np.arange(len(x)), k, seed, x.shape[1], x.dtype)


def test_kmeans_plus_plus_draws_by_squared_distance() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0]])
    pairs = np.zeros((3, 3))
    for seed in range(3000):
        first, second = kmeans_start.plus_plus(x, np.arange(3), 2, seed)[:, 0].tolist()
        pairs[[0.0, 1.0, 3.0].index(first), [0.0, 1.0, 3.0].index(second)] += 1
    # The first is uniform; then 1:9 from 0, 1:4 from 1, 9:4 from 3.
    expected = np.array([[0, 1 / 10, 9 / 10], [1 / 5, 0, 4 / 5], [9 / 13, 4 / 13, 0]]) / 3
    assert np.abs(pairs / 3000 - expected).max() < 4 * np.sqrt(0.25 * 0.75 / 3000)
    assert pairs.diagonal().sum() == 0


def test_the_third_centroid_is_drawn_by_the_distance_from_the_nearest() -> None:
    x = torch.tensor([[0.0], [10.0], [2.0], [9.0]])
    counts = {2.0: 0, 9.0: 0}
    for seed in range(3000):
        a, b, c = kmeans_start.plus_plus(x, np.arange(4), 3, seed)[:, 0].tolist()
        if {a, b} == {0.0, 10.0}:
            counts[c] += 1
    total = sum(counts.values())
    assert total > 500
    assert abs(counts[2.0] / total - 4 / 5) < 4 * np.sqrt(0.16 / total)


def test_rows_far_from_the_origin_are_drawn_as_if_they_were_at_it() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).mul(64).round() / 64
    there = x + 2.0**12  # exact in float32
    for seed in range(20):
        assert torch.equal(draw("k-means++", x, 8, seed) + 2.0**12, draw("k-means++", there, 8, seed))


def test_a_random_start_is_uniform_over_rows_and_without_replacement() -> None:
    x = torch.arange(10.0)[:, None]
    counts = torch.zeros(10)
    for seed in range(3000):
        drawn = draw("random", x, 3, seed)[:, 0].long()
        assert len(drawn.unique()) == 3
        counts[drawn] += 1
    assert (counts / 3000 - 0.3).abs().max() < 4 * np.sqrt(0.3 * 0.7 / 3000)


def test_a_start_depends_on_ids_and_not_on_the_order_of_rows() -> None:
    x = torch.randn(6000, 4, generator=torch.Generator().manual_seed(0))
    ids = np.arange(6000) * 1009 + 17
    order = torch.randperm(6000, generator=torch.Generator().manual_seed(1))
    for name in kmeans_start.STARTS:
        a = kmeans_start.draw(name, Rows(x), ids, 50, 1, 4, x.dtype)
        b = kmeans_start.draw(name, Rows(x[order]), ids[order.numpy()], 50, 1, 4, x.dtype)
        other = kmeans_start.draw(name, Rows(x), ids, 50, 2, 4, x.dtype)
        assert torch.equal(a, b)
        assert not torch.equal(a, other)
        assert len(torch.cat([a.unique(dim=0), x]).unique(dim=0)) == len(x)


def test_every_distinct_row_is_drawn_before_one_twice() -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).repeat(40, 1) + 100
    for seed in range(20):
        assert len(draw("k-means++", x, 5, seed).unique(dim=0)) == 5
    assert draw("k-means++", x, 9, 0).shape == (9, 3)
