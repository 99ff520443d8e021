"""Balanced order: as many samples of every cluster, wherever an epoch is asked for, and read shard by shard."""

from __future__ import annotations

import numpy as np
import pytest

from distssl.data import balanced_order
from distssl.data.order import Order

SHARDS = np.cumsum([0, 100, 3, 57, 211, 1, 90, 40])  # 502 samples


def uneven(num: int = 502, k: int = 7, empty: int = 3) -> np.ndarray:
    """Clusters of very different sizes, one of them empty and some samples in none."""
    rng = np.random.default_rng(0)
    clusters = rng.choice(k, num, p=np.array([0.55, 0.2, 0.1, 0.05, 0.05, 0.03, 0.02]))
    clusters[clusters == empty] = 0
    clusters[rng.choice(num, 10, replace=False)] = -1
    return clusters


def test_every_cluster_is_drawn_alike_and_the_epoch_is_as_long_as_ever() -> None:
    clusters = uneven()
    for epoch in range(5):
        ids = balanced_order.choose(clusters, seed=1, epoch=epoch)
        assert len(ids) == 502
        assert (np.diff(ids) >= 0).all()
        drawn = np.bincount(clusters[ids] + 1, minlength=8)
        assert drawn[0] == drawn[4] == 0  # no cluster; the empty one
        each = 502 // 6 + 1
        assert drawn.sum() == 502
        assert drawn.max() <= each
        assert drawn[[1, 2, 3, 5, 6, 7]].min() >= each - (6 * each - 502)


def test_a_sample_comes_again_only_where_its_cluster_is_too_small() -> None:
    clusters = uneven()
    ids, each = balanced_order.choose(clusters, seed=1, epoch=0), 502 // 6 + 1
    sizes = np.bincount(clusters[clusters >= 0], minlength=7)
    for cluster in np.flatnonzero(sizes):
        times = np.bincount(ids[clusters[ids] == cluster], minlength=502)[clusters == cluster]
        assert times.max() <= -(-each // sizes[cluster])
        if sizes[cluster] < each:
            assert times.min() >= each // sizes[cluster] - 1  # what is too much is taken back


def test_every_sample_of_every_cluster_has_its_turn() -> None:
    clusters = uneven()
    drawn = [balanced_order.choose(clusters, seed=1, epoch=epoch) for epoch in range(60)]
    assert set(np.concatenate(drawn)) == set(np.flatnonzero(clusters >= 0))
    counts = np.bincount(np.concatenate(drawn), minlength=502)
    sizes = np.bincount(clusters[clusters >= 0], minlength=7)
    for cluster in np.flatnonzero(sizes):  # uniform within a cluster: a binomial's mean and, roughly, deviation
        mine = counts[clusters == cluster]
        assert mine.mean() == pytest.approx(60 * 502 / 6 / sizes[cluster], rel=0.02)
        assert mine.std() < 1.5 * np.sqrt(mine.mean())


def test_it_is_a_pure_function_of_seed_epoch_and_clusters() -> None:
    clusters = uneven()
    first = balanced_order.choose(clusters, seed=1, epoch=2)
    assert np.array_equal(first, balanced_order.choose(clusters.copy(), seed=1, epoch=2))
    others = [balanced_order.choose(clusters, seed=seed, epoch=epoch) for seed, epoch in ((1, 3), (2, 2))]
    assert not any(np.array_equal(first, other) for other in others)


def test_clusters_of_one_size_give_every_sample_once_but_for_the_lot() -> None:
    ids = balanced_order.choose(np.arange(500) % 5, seed=0, epoch=0)
    assert len(np.unique(ids)) >= 495  # 101 are asked of each 100, and five of 505 taken back
    assert np.bincount(ids % 5).tolist() == pytest.approx([100] * 5, abs=5)


def test_without_any_cluster_it_is_refused() -> None:
    with pytest.raises(ValueError, match="no sample has a cluster"):
        balanced_order.choose(np.full(8, -1), seed=0, epoch=0)


def test_copies_are_counted() -> None:
    assert balanced_order.copies(np.array([0, 2, 2, 2, 5, 9, 9])).tolist() == [0, 0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_among_the_chosen_each_position_comes_once_and_shards_stay_together(world_size: int) -> None:
    made = Order(SHARDS, seed=0, global_batch=24, lanes=4, shuffle_window=10)
    ids = balanced_order.choose(uneven(), seed=0, epoch=3)
    order = made.among(ids)
    assert order.steps_per_epoch == made.steps_per_epoch
    parts = [
        np.concatenate([order.rank_batch(3, step, rank=r, world_size=world_size) for r in range(world_size)])
        for step in range(order.steps_per_epoch)
    ]
    positions = np.concatenate(parts)
    assert len(np.unique(positions)) == len(positions) == 502 - order.left_out
    shard = np.searchsorted(SHARDS, ids[positions], side="right") - 1
    lanes = shard.reshape(-1, 4, 6).swapaxes(0, 1).reshape(4, -1)  # a lane's samples one after the other
    windows = lanes[:, :120].reshape(4, -1, 10)
    # A window of ten neighbours on the epoch's line spans few of the seven shards.
    assert np.mean([len(np.unique(window)) for lane in windows for window in lane]) < 2
