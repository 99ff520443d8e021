"""k-means against a plain Lloyd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distssl.nn import bounds, kmeans
from tests import blobs

N, D, K = 900, 12, 30


def problem(num: int = N, dim: int = D, sources: int = 45, seed: int = 0) -> Tensor:
    return blobs.overlapping(num, dim, sources, noise=0.5, seed=seed)


def lloyd(x: Tensor, start: Tensor, iterations: int) -> tuple[Tensor, Tensor, float]:
    """By its definition, in float64: centroids, labels, objective."""
    x, centroids = x.double(), start.double()
    labels = torch.cdist(x, centroids).argmin(1)
    for _ in range(iterations):
        centroids = torch.stack([x[labels == j].mean(0) for j in range(len(centroids))])
        labels = torch.cdist(x, centroids).argmin(1)
    return centroids, labels, float((x - centroids[labels]).square().sum())


@pytest.mark.parametrize("k", [1, 7, K, 130])
@pytest.mark.parametrize("skip", [True, False])
def test_it_is_lloyds_algorithm(k: int, skip: bool) -> None:
    x = problem()
    start = x[torch.randperm(N, generator=torch.Generator().manual_seed(1))[:k]]
    found = kmeans.fit(x, k, iterations=6, init=start, skip=skip)
    centroids, labels, objective = lloyd(x, start, found.num_iterations)
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.centroids.double(), centroids, rtol=1e-5, atol=1e-6)
    assert found.objective == pytest.approx(objective, rel=1e-6)
    assert torch.equal(found.sizes, labels.bincount(minlength=k))


def test_bounds_pass_over_most_of_the_work_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, made = problem(2000, 8, sources=200), []

    class Counted(bounds.Bounds):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            made.append(self)

    monkeypatch.setattr(kmeans, "Bounds", Counted)
    fast = kmeans.fit(x, 200, iterations=30)
    slow = kmeans.fit(x, 200, iterations=30, skip=False)
    assert torch.equal(fast.labels, slow.labels)
    assert torch.equal(fast.centroids, slow.centroids)
    assert made[0].num_scored < 0.6 * (fast.num_iterations + 1) * 2000 * 200


def test_spherical_centroids_have_length_one_and_rows_go_to_the_largest_product() -> None:
    x = torch.nn.functional.normalize(problem(), dim=1)
    found = kmeans.fit(x, K, spherical=True)
    torch.testing.assert_close(found.centroids.norm(dim=1), torch.ones(K))
    assert torch.equal(found.labels, (x.double() @ found.centroids.double().T).argmax(1))


def test_balanced_clusters_are_of_nearly_equal_size() -> None:
    x = torch.cat([problem(N - 100, sources=3), problem(100, sources=20, seed=5)])  # a few dense spots
    sizes = [kmeans.fit(x, 10, balanced=balanced).sizes for balanced in (False, True)]
    assert sizes[0].max() > 1.5 * N / 10
    assert sizes[1].max() < 1.3 * N / 10
    assert sizes[1].min() > 0.7 * N / 10


def test_empty_clusters_are_refilled_from_large_ones() -> None:
    x = problem()
    start = torch.cat([x[: K // 2], x[:1] + 100 + torch.arange(K // 2)[:, None]])  # the second half is far from all
    found = kmeans.fit(x, K, iterations=20, init=start)
    assert found.num_refilled >= K // 2 - 1
    assert found.sizes.min() > 0
    assert found.objective < 0.8 * kmeans.fit(x, K // 2, iterations=20, init=x[: K // 2]).objective


def test_it_stops_where_no_row_changes_and_tells_of_every_iteration() -> None:
    told = []
    found = kmeans.fit(problem(), 5, iterations=200, progress=lambda *what: told.append(what))
    assert found.converged
    assert found.num_iterations < 200
    assert [nth for nth, _, _ in told] == list(range(1, found.num_iterations + 1))
    objectives = [objective for _, _, objective in told]
    assert objectives == sorted(objectives, reverse=True)


def test_assignment_is_to_the_nearest_and_of_equal_ones_to_the_first() -> None:
    x, centroids = problem(), problem(50, seed=2)
    assert torch.equal(kmeans.assign(x, centroids), torch.cdist(x.double(), centroids.double()).argmin(1))
    assert torch.equal(kmeans.assign(x, centroids.repeat(3, 1)), kmeans.assign(x, centroids))
