"""k-means against a plain float64 Lloyd, and the same result however rows are spread over ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor

from distssl import collectives
from distssl.nn import bounds, clustering_metrics, kmeans, kmeans_start

N, D, K = 900, 12, 30


def blobs(num: int = N, dim: int = D, centres: int = 45, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, dim, generator=generator)
    return middle[torch.arange(num) % centres] + 0.5 * torch.randn(num, dim, generator=generator)


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
    x = blobs()
    start = x[torch.randperm(N, generator=torch.Generator().manual_seed(1))[:k]]
    found = kmeans.fit(x, k, iterations=6, init=start, skip=skip)
    centroids, labels, objective = lloyd(x, start, found.num_iterations)
    assert torch.equal(found.labels, labels)
    torch.testing.assert_close(found.centroids.double(), centroids, rtol=1e-5, atol=1e-6)
    assert found.objective == pytest.approx(objective, rel=1e-6)
    assert torch.equal(found.sizes, labels.bincount(minlength=k))


def test_bounds_pass_over_most_of_the_work_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, made = blobs(2000, 8, centres=200), []

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
    x = torch.nn.functional.normalize(blobs(), dim=1)
    found = kmeans.fit(x, K, spherical=True)
    torch.testing.assert_close(found.centroids.norm(dim=1), torch.ones(K))
    assert torch.equal(found.labels, (x.double() @ found.centroids.double().T).argmax(1))


def test_balanced_clusters_are_of_nearly_equal_size() -> None:
    x = torch.cat([blobs(N - 100, centres=3), blobs(100, centres=20, seed=5)])  # a few dense spots
    sizes = [kmeans.fit(x, 10, balanced=balanced).sizes for balanced in (False, True)]
    assert sizes[0].max() > 1.5 * N / 10
    assert sizes[1].max() < 1.3 * N / 10
    assert sizes[1].min() > 0.7 * N / 10


def test_empty_clusters_are_refilled_from_large_ones() -> None:
    x = blobs()
    start = torch.cat([x[: K // 2], x[:1] + 100 + torch.arange(K // 2)[:, None]])  # the second half is far from all
    found = kmeans.fit(x, K, iterations=20, init=start)
    assert found.num_refilled >= K // 2 - 1
    assert found.sizes.min() > 0
    assert found.objective < 0.8 * kmeans.fit(x, K // 2, iterations=20, init=x[: K // 2]).objective


def test_a_start_by_k_means_plus_plus_follows_the_squared_distance() -> None:
    x = torch.tensor([[0.0], [1.0], [3.0]])  # after a start at 0 the next is 1 or 3 as 1 to 9
    second = []
    for seed in range(2000):
        first, other = kmeans_start.plus_plus(x, np.arange(3), 2, seed).flatten().tolist()
        if first == 0:
            second.append(other)
    share = np.mean(np.array(second) == 3)
    assert abs(share - 0.9) < 4 * (0.9 * 0.1 / len(second)) ** 0.5


def test_a_file_and_blocks_made_on_the_fly_give_what_the_tensor_gives(tmp_path: Path) -> None:
    x = blobs()
    np.save(tmp_path / "x.npy", x.numpy())
    expected = kmeans.fit(x, K)
    for source in (np.load(tmp_path / "x.npy", mmap_mode="r"), lambda: iter(x.split(113))):
        found = kmeans.fit(source, K)
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.centroids, expected.centroids)


def fit_here(x: Tensor, ids: Tensor, bounds_: list[int], k: int, init: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """On a rank: the clusters of its rows, which are `bounds_[rank]` up to the next of x."""
    rank = collectives.rank()
    mine = slice(bounds_[rank], bounds_[rank + 1])
    found = kmeans.fit(x[mine], k, seed=3, ids=ids[mine], init=init)
    return ids[mine], found.labels, found.centroids, found.objective


@pytest.mark.dist
@pytest.mark.parametrize("init", kmeans_start.STARTS)
@pytest.mark.parametrize("bounds_", [[0, 900], [0, 450, 900], [0, 0, 77, 500, 900]])
def test_the_result_does_not_depend_on_which_rank_holds_a_row(ranks, bounds_: list[int], init: str) -> None:
    x = blobs()
    alone = kmeans.fit(x, K, seed=3, init=init)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(9))
    for of_rank in ranks(len(bounds_) - 1).run(fit_here, x[order], order, bounds_, K, init):
        ids, labels, centroids, objective = of_rank
        assert torch.equal(labels, alone.labels[ids])
        assert torch.equal(centroids, alone.centroids)
        assert objective == pytest.approx(alone.objective, rel=1e-9)


def fail_here(num: int, k: int) -> str:
    x = blobs(num)
    if collectives.rank() == 1:
        x[5, 2] = torch.nan
    with pytest.raises(ValueError, match=r"rank 1: x\[5\] is NaN") as raised:
        kmeans.fit(x, k)
    return str(raised.value)


@pytest.mark.dist
def test_bad_rows_of_one_rank_raise_on_all(ranks) -> None:
    first, second = ranks(2).run(fail_here, 50, 3)
    assert first == second


def test_what_cannot_be_clustered_is_said() -> None:
    x = blobs(40)
    for arguments, message in (
        ((x, 41), "k=41 clusters of 40 rows"),
        ((x, 0), "k=0 clusters"),
        ((x, 3, 0), "iterations=0"),
        ((x[:1].repeat(40, 1), 2), "constant features: all rows are equal; k at most 1"),
        ((x[:2].repeat(20, 1), 3), "x has 2 distinct rows; k at most 2"),
    ):
        with pytest.raises(ValueError, match=message):
            kmeans.fit(*arguments)
    with pytest.raises(ValueError, match=r"finite centroids \[3, 12\] are right"):
        kmeans.fit(x, 3, init=x[:2])
    with pytest.raises(ValueError, match="'k-means\\+\\+', 'random' or a tensor"):
        kmeans.fit(x, 3, init="best")
    with pytest.raises(ValueError, match="integers"):
        kmeans.fit(x, 3, ids=torch.arange(39))


def test_it_stops_where_no_row_changes_and_tells_of_every_iteration() -> None:
    told = []
    found = kmeans.fit(blobs(), 5, iterations=200, progress=lambda *what: told.append(what))
    assert found.converged
    assert found.num_iterations < 200
    assert [nth for nth, _, _ in told] == list(range(1, found.num_iterations + 1))
    objectives = [objective for _, _, objective in told]
    assert objectives == sorted(objectives, reverse=True)


def test_assignment_is_to_the_nearest_and_of_equal_ones_to_the_first() -> None:
    x, centroids = blobs(), blobs(50, seed=2)
    assert torch.equal(kmeans.assign(x, centroids), torch.cdist(x.double(), centroids.double()).argmin(1))
    assert torch.equal(kmeans.assign(x, centroids.repeat(3, 1)), kmeans.assign(x, centroids))


def test_metrics_of_clusterings() -> None:
    a, b = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([5, 5, 3, 3, 3, 4])
    assert clustering_metrics.hungarian_accuracy(a, b) == pytest.approx(5 / 6)
    assert clustering_metrics.adjusted_rand(a, a + 7) == 1.0
    assert clustering_metrics.adjusted_rand(a, b) == pytest.approx(metrics.adjusted_rand_score(a, b))
    # Entropies log 3 each, and (log 3 + log 3) / 2 - joint by hand: b splits 2, 3, 1 of 6.
    h_a, h_b = np.log(3), -sum(p * np.log(p) for p in (2 / 6, 3 / 6, 1 / 6))
    joint = -sum(p * np.log(p) for p in (2 / 6, 2 / 6, 1 / 6, 1 / 6))
    expected = (h_a + h_b - joint) / ((h_a + h_b) / 2)
    assert clustering_metrics.normalised_mutual_information(a, b) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"\[6\] and \[5\]"):
        clustering_metrics.hungarian_accuracy(a, b[:5])
