from __future__ import annotations

import torch

from distssl.nn import cluster_sums, kmeans


def test_an_empty_cluster_takes_half_of_the_largest() -> None:
    generator = torch.Generator().manual_seed(0)
    large, small = torch.randn(300, 8, generator=generator), torch.randn(100, 8, generator=generator) + 20
    far = torch.full((8,), -1e3)
    start = torch.stack([large.mean(0), far, small.mean(0)])
    found = kmeans.fit(torch.cat([large, small]), 3, 1, init=start)
    assert found.num_refilled == 1
    # Both halves stand beside the donor's mean, on opposite sides, nearer than its rows lie.
    torch.testing.assert_close(found.centroids[:2].mean(0), large.mean(0), atol=1e-5, rtol=0)
    apart = (found.centroids[1] - found.centroids[0]).abs()
    torch.testing.assert_close(apart, apart[:1].expand(8), atol=1e-6, rtol=0)
    assert 0 < apart[0] < 0.2
    torch.testing.assert_close(found.centroids[2], small.mean(0), atol=1e-4, rtol=0)
    assert found.sizes[0] + found.sizes[1] == 300
    assert found.sizes[:2].min() > 75


def test_a_cluster_of_equal_rows_is_not_split_for_ever() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.zeros(500, 4), torch.randn(300, 4, generator=generator) + 8])
    found = kmeans.fit(x, 6, 30, init=torch.cat([x[:1], x[500:501], torch.full((4, 4), 1e3)]))
    assert found.converged
    assert found.sizes.min() > 0
    assert found.sizes.max() == 500


def test_sums_are_exact_in_any_order_and_moves_leave_no_trace() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 3, generator=generator) * 10.0 ** torch.randint(-6, 4, (5000, 3), generator=generator)
    labels = torch.randint(4, (5000,), generator=generator)
    order = torch.randperm(5000, generator=generator)
    none, largest = torch.full((5000,), -1), float(x.abs().max())
    straight, shuffled = (cluster_sums.ClusterSums(4, 3, largest, 5000, x.device) for _ in range(2))
    straight.move(x, none, labels)
    wrong = torch.randint(4, (5000,), generator=generator)
    shuffled.move(x[order], none, wrong[order])
    assert shuffled.move(x, wrong, labels) == int((wrong != labels).sum())
    assert torch.equal(straight.sums, shuffled.sums)
    assert torch.equal(straight.sizes, torch.bincount(labels, minlength=4).double())
    exact = torch.zeros(4, 3, dtype=torch.float64).index_add_(0, labels, x.double())
    assert (straight.sums - exact).abs().max() < 5000 * largest * 5000 * 2.0**-52
