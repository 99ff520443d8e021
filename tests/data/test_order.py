"""Order: a pure function that gives each sample at most once an epoch, whatever the number of workers."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from distssl.data import order
from distssl.data.order import Order
from distssl.errors import ConfigError

SHARDS = np.cumsum([0, 100, 3, 57, 211, 1, 90, 40])  # 502 samples


def make(shard_first: np.ndarray = SHARDS, **options) -> Order:
    return Order(shard_first, **{"seed": 0, "global_batch": 24, "shuffle_window": 10, **options})


def epoch_ids(made: Order, epoch: int) -> np.ndarray:
    return np.concatenate([made.batch(epoch, step) for step in range(made.steps_per_epoch)])


@pytest.mark.parametrize("options", [{}, {"lanes": 1}, {"lanes": 24}, {"shuffle_window": 1}, {"shuffle_window": 10**6}])
@pytest.mark.parametrize("global_batch", [1, 24, 96, 502])
def test_an_epoch_has_each_sample_once_but_for_the_remainder(global_batch: int, options: dict) -> None:
    if global_batch % options.get("lanes", 1):
        pytest.skip("lanes must divide the global batch")
    made = make(global_batch=global_batch, **options)
    for epoch in range(3):
        ids = epoch_ids(made, epoch)
        assert ids.dtype == np.int64
        assert len(np.unique(ids)) == len(ids) == 502 - made.left_out
        assert ids.min() >= 0
        assert ids.max() < 502
    per_lane = global_batch // made.lanes
    assert made.left_out == 502 - 502 // made.lanes // per_lane * global_batch


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_ranks_slices_are_the_global_batch(world_size: int) -> None:
    made = make()
    made.check_world_size(world_size)
    for epoch, step in [(0, 0), (0, 7), (1, 0), (5, made.steps_per_epoch - 1)]:
        # A fresh order for each rank: what one process has seen before must not matter.
        parts = [make().rank_batch(epoch, step, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts), made.batch(epoch, step))


def test_epochs_and_seeds_are_different_orders() -> None:
    epochs = [epoch_ids(make(), epoch) for epoch in range(3)]
    other_seed = epoch_ids(make(seed=1), 0)
    for ids in (*epochs[1:], other_seed):
        assert (ids == epochs[0]).mean() < 0.2  # seven shards: some may stay in their place


def test_the_remainder_is_another_one_in_each_epoch() -> None:
    left_out = [set(range(502)) - set(epoch_ids(make(), epoch).tolist()) for epoch in range(4)]
    assert len(set.intersection(*left_out)) < 5


def test_every_shard_comes_first_about_equally_often() -> None:
    made = make(np.arange(0, 801, 100), lanes=1, shuffle_window=1)
    first = [int(made.batch(epoch, 0)[0]) // 100 for epoch in range(800)]
    assert np.bincount(first, minlength=8) == pytest.approx(100, abs=45)


def test_shuffling_stays_inside_its_window_and_shards_stay_together() -> None:
    made = make(np.arange(0, 1001, 100), lanes=2, global_batch=2, shuffle_window=50)
    lanes = epoch_ids(made, 0).reshape(-1, 2).T  # [2, 500]
    for lane in lanes:
        windows = np.sort(lane.reshape(-1, 50), axis=1)
        assert (np.diff(windows, axis=1) == 1).all()  # a window is a contiguous part of one shard
        assert (windows[::2, 0] + 50 == windows[1::2, 0]).all()
        assert (lane.reshape(-1, 50) != windows).mean() > 0.9


def test_a_hundred_million_samples_need_no_array_of_their_size() -> None:
    shard_first = np.arange(0, 10**8 + 1, 10_000)
    tracemalloc.start()
    try:
        made = make(shard_first, global_batch=4096, shuffle_window=2048)
        ids = np.concatenate([made.batch(epoch, step) for epoch in (0, 3) for step in (0, 12_345)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(np.unique(ids[:8192])) == 8192
    assert peak < 20e6  # 10^8 int64 would be 800e6
    assert made.left_out < 2 * 4096


@pytest.mark.parametrize(("global_batch", "lanes"), [(256, 64), (4096, 64), (1024, 64), (96, 96), (480, 96), (97, 1)])
def test_default_lanes_suit_the_most_workers(global_batch: int, lanes: int) -> None:
    assert order.default_lanes(global_batch) == lanes
    assert global_batch % lanes == 0


def test_default_lanes_have_the_most_divisors() -> None:
    for global_batch in range(1, 400):
        lanes = order.default_lanes(global_batch)
        allowed = [d for d in range(1, 97) if global_batch % d == 0]
        assert lanes in allowed
        assert order.num_divisors(lanes) == max(order.num_divisors(d) for d in allowed)


def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes=7 does not divide data\.global_batch=24; nearest: 6 or 8"):
        make(lanes=7)
    with pytest.raises(ConfigError, match=r"data\.lanes=100 .* nearest: 24$"):
        make(lanes=100)
    with pytest.raises(ConfigError, match=r"data\.global_batch=600 is more than the 502 samples"):
        make(global_batch=600)
    with pytest.raises(ConfigError, match=r"workers=5 does not divide data\.lanes=24; nearest: 4 or 6"):
        make().check_world_size(5)
    with pytest.raises(ConfigError, match=r"workers=48 .* nearest: 24$"):
        make().check_world_size(48)


def test_a_replacement_is_of_the_same_lane_first_then_of_any_and_a_pure_function() -> None:
    made = make(lanes=8)
    lanes = [set(epoch_ids(make(lanes=8, global_batch=8), 2).reshape(-1, 8)[:, lane].tolist()) for lane in range(8)]
    for slot in range(24):
        ids = [made.replacement(2, 5, slot, attempt) for attempt in range(order.NUM_ATTEMPTS)]
        own, any_lane = ids[: order.NUM_ATTEMPTS // 2], ids[order.NUM_ATTEMPTS // 2 :]
        assert set(own) <= lanes[slot // 3]
        assert len(set(own)) > 10
        assert sum(bool(set(any_lane) & lane) for lane in lanes) > 5
        assert ids == [make(lanes=8).replacement(2, 5, slot, attempt) for attempt in range(order.NUM_ATTEMPTS)]
    assert len({made.replacement(2, step, 0, 0) for step in range(20)}) > 10
