from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distssl import collectives
from distssl.nn import kmeans
from distssl.nn.kmeans import KMeans
from tests import blobs

ROWS, DIM, CLUSTERS = 700, 12, 20


def problem() -> Tensor:
    return blobs.overlapping(ROWS, DIM, sources=30)


def shares(how: str, rank: int, world_size: int) -> Tensor:
    """Which of all rows a rank holds."""
    if how == "blocks of unequal size, one without rows":
        cuts = {1: [0, ROWS], 2: [0, 0, ROWS], 4: [0, 90, 90, 500, ROWS]}[world_size]
        return torch.arange(cuts[rank], cuts[rank + 1])
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(world_size))
    return order[rank::world_size]


def of_this_rank(how: str, k: int, options: dict[str, Any]) -> tuple[Tensor, KMeans]:
    mine = shares(how, collectives.rank(), collectives.world_size())
    return mine, kmeans.fit(problem()[mine], k, 15, seed=3, ids=mine * 7 + 5, **options)


@pytest.mark.parametrize("how", ["blocks of unequal size, one without rows", "at random"])
@pytest.mark.parametrize(
    ("k", "options"),
    [
        (CLUSTERS, {"init": "k-means++"}),
        (CLUSTERS, {"init": "random"}),
        (150, {"init": torch.full((150, DIM), 9.0).cumsum(0)}),  # nearly all empty at first
        (CLUSTERS, {"spherical": True}),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_fit_is_the_same_bits_whoever_holds_a_row(ranks, world_size, k, options, how) -> None:
    alone = kmeans.fit(problem(), k, 15, seed=3, ids=torch.arange(ROWS) * 7 + 5, **options)
    results = (
        ranks(world_size).run(of_this_rank, how, k, options) if world_size > 1 else [of_this_rank(how, k, options)]
    )
    for mine, found in results:
        assert torch.equal(found.centroids, alone.centroids)
        assert torch.equal(found.labels, alone.labels[mine])
        assert torch.equal(found.sizes, alone.sizes)
        assert found.objective == pytest.approx(alone.objective, rel=1e-12)
        assert (found.num_iterations, found.num_refilled) == (alone.num_iterations, alone.num_refilled)


def balanced_of_this_rank(how: str) -> tuple[Tensor, KMeans]:
    return of_this_rank(how, CLUSTERS, {"balanced": True})


@pytest.mark.parametrize("world_size", [2, 4])
def test_balanced_clusters_are_the_same_at_every_world_size(ranks, world_size) -> None:
    alone = kmeans.fit(problem(), CLUSTERS, 15, seed=3, ids=torch.arange(ROWS) * 7 + 5, balanced=True)
    for mine, found in ranks(world_size).run(balanced_of_this_rank, "at random"):
        torch.testing.assert_close(found.centroids, alone.centroids, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.labels, alone.labels[mine])


def unnumbered_of_this_rank() -> Tensor:
    mine = shares("blocks of unequal size, one without rows", collectives.rank(), collectives.world_size())
    return kmeans.fit(problem()[mine], CLUSTERS, 5).centroids


def test_rows_without_ids_are_numbered_through_the_ranks(ranks) -> None:
    alone = kmeans.fit(problem(), CLUSTERS, 5, ids=np.arange(ROWS)).centroids
    for centroids in [unnumbered_of_this_rank(), *ranks(4).run(unnumbered_of_this_rank)]:
        assert torch.equal(centroids, alone)


def numbers_sent(how: str, k: int) -> tuple[list[int], int]:
    sent: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        plain = collectives.sum_
        patch.setattr(collectives, "sum_", lambda x: sent.append(x.numel()) or plain(x))
        _, found = of_this_rank(how, k, {"init": problem()[:k]})
    return sent, found.num_iterations


def test_an_iteration_sends_sums_sizes_and_one_count(ranks) -> None:
    for sent, iterations in ranks(2).run(numbers_sent, "at random", CLUSTERS):
        assert sent == [CLUSTERS * (DIM + 1) + 1] * (iterations + 1)


def error_of_this_rank(mistake: str) -> str:
    x, options = problem(), {}
    second = collectives.rank() == 1
    if mistake == "NaN" and second:
        x[3, 2] = torch.nan
    elif mistake == "features" and second:
        x = x[:, 1:]
    elif mistake == "type" and second:
        x = x.double()
    elif mistake == "ids" and second:
        options["ids"] = torch.arange(2)
    elif mistake == "constant":
        x = torch.full((50, 3), 0.1)
    with pytest.raises(ValueError, match="right") as caught:
        kmeans.fit(x, CLUSTERS, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("NaN", "rank 1: x[3] is NaN"),
        ("features", "on the ranks; one kind is right"),
        ("type", "float64"),
        ("ids", "rank 1: ids: int64 [2]"),
        ("constant", "constant features"),
    ],
)
def test_one_ranks_mistake_raises_on_all(ranks, mistake, message) -> None:
    for error in ranks(2).run(error_of_this_rank, mistake):
        assert message in error
