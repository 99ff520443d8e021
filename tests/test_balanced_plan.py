"""What is asked of the loader where an epoch is balanced over clusters: the same at any number of workers."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import pytest

from distssl.data import draws
from distssl.data.loader import Request
from distssl.data.order import Order
from distssl.plan import Plan

CLUSTERS = np.where(np.arange(200) < 150, 0, np.arange(200) % 3)


class Rank(NamedTuple):
    rank: int
    world_size: int


def requests(start: int, rank: int = 0, world_size: int = 1) -> list[Request]:
    order = Order(np.arange(0, 201, 20), seed=0, global_batch=24, lanes=4, shuffle_window=10)
    made = Plan(order, epochs=3, accumulate=2)
    return list(made.balanced_requests(start, CLUSTERS, cast(Any, Rank(rank, world_size))))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ranks_requests_are_the_global_batch_and_end_with_the_epoch(world_size: int) -> None:
    alone = requests(4)
    assert len(alone) == 2 * 4  # two batches a step, four steps an epoch
    parts = [requests(4, rank, world_size) for rank in range(world_size)]
    for batch, of_ranks in zip(alone, zip(*parts, strict=True), strict=True):
        assert np.array_equal(batch.ids, np.concatenate([part.ids for part in of_ranks]))
        assert batch.epochs == [epoch for part in of_ranks for epoch in part.epochs]
        size = 24 // world_size
        for slot in (0, 5, 23):
            replace = of_ranks[slot // size].replace
            assert replace is not None
            assert batch.replace is not None
            assert replace(slot % size, 3) == batch.replace(slot, 3)


def test_from_the_middle_of_an_epoch_on_the_requests_are_the_same() -> None:
    whole, rest = requests(4), requests(6)
    assert [r.ids.tolist() for r in rest] == [r.ids.tolist() for r in whole[4:]]
    assert [r.epochs for r in rest] == [r.epochs for r in whole[4:]]


def test_a_sample_that_comes_again_in_an_epoch_has_other_draws() -> None:
    asked = [
        (sample, epoch) for request in requests(0) for sample, epoch in zip(request.ids, request.epochs, strict=True)
    ]
    assert len(set(asked)) == len(asked)
    assert len({sample for sample, _ in asked}) < len(asked)
    ids, epochs = (np.array(part) for part in zip(*asked, strict=True))
    drawn = draws.uniforms(0, epochs, ids, 4)
    assert len(np.unique(drawn, axis=0)) == len(drawn)
    alone = [draws.uniforms(0, int(epoch), ids[i : i + 1], 4)[0] for i, epoch in enumerate(epochs)]
    assert np.array_equal(drawn, np.stack(alone))


def test_what_stands_in_for_a_bad_sample_has_a_cluster_too() -> None:
    clusters = np.where(np.arange(200) % 2, -1, 0)
    order = Order(np.arange(0, 201, 20), seed=0, global_batch=24, lanes=4, shuffle_window=10)
    made = Plan(order, epochs=1, accumulate=1).balanced_requests(0, clusters, cast(Any, Rank(0, 1)))
    for request in made:
        assert (clusters[request.ids] == 0).all()
        assert request.replace is not None
        assert all(clusters[request.replace(index, attempt)] == 0 for index in (0, 7) for attempt in (0, 40))
