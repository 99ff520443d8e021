"""The plan: which requests a rank makes from which optimiser step on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from distssl import plan
from distssl.data import shards
from distssl.data.order import Order
from distssl.data.shards import Dataset
from distssl.errors import ConfigError
from distssl.nn.micro_batches import MicroBatches
from distssl.plan import Plan
from tests import planted, runs


@dataclass
class Rank:
    """What a plan asks of a context."""

    rank: int
    world_size: int


def requests(made: Plan, start: int = 0, rank: int = 0, world_size: int = 1) -> list[Any]:
    return list(made.requests(start, cast(Any, Rank(rank, world_size))))


def make(accumulate: int = 1, epochs: int = 3) -> Plan:
    return Plan(Order(np.arange(0, 201, 20), seed=0, global_batch=24, shuffle_window=10), epochs, accumulate)


def test_steps_are_whole_epochs_of_global_batches() -> None:
    made = make(accumulate=3)  # an epoch has 8 batches, so 2 optimiser steps and 2 batches over
    assert (made.steps_per_epoch, made.total_steps, made.images_per_step) == (2, 6, 72)
    assert [made.epoch(step) for step in range(6)] == [0, 0, 1, 1, 2, 2]
    asked = requests(made)
    assert [request.epoch for request in asked] == [0] * 6 + [1] * 6 + [2] * 6
    for epoch in range(3):
        ids = np.concatenate([request.ids for request in asked if request.epoch == epoch])
        assert len(np.unique(ids)) == len(ids) == 2 * 72


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_plan_that_starts_later_goes_on_where_the_whole_one_would(accumulate: int) -> None:
    whole = requests(make(accumulate))
    for start in (0, 1, make(accumulate).steps_per_epoch, make(accumulate).total_steps):
        rest = requests(make(accumulate), start)
        assert len(rest) == len(whole) - start * accumulate
        for a, b in zip(rest, whole[start * accumulate :], strict=True):
            assert np.array_equal(a.ids, b.ids)
            assert a.epoch == b.epoch


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_ask_for_parts_of_the_global_batch_and_replace_alike(world_size: int) -> None:
    whole = requests(make())
    parts = [requests(make(), 0, rank, world_size) for rank in range(world_size)]
    for step, request in enumerate(whole):
        assert np.array_equal(np.concatenate([part[step].ids for part in parts]), request.ids)
        replaced = [
            part[step].replace(index, attempt)
            for part in parts
            for index in range(24 // world_size)
            for attempt in (0, 5)
        ]
        assert replaced == [request.replace(index, attempt) for index in range(24) for attempt in (0, 5)]


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    planted.write_tar(tmp_path / "t" / "a.tar", [(f"{i}.png", planted.picture(i)) for i in range(40)])
    dataset = Dataset.open(shards.index(str(tmp_path / "t")))

    def of(*overrides: str, world_size: int = 1) -> Plan:
        return plan.of_run(runs.tiny(tmp_path / "t", tmp_path, *overrides), dataset, world_size)

    assert of("train.epochs=2").total_steps == 4
    with pytest.raises(ConfigError, match=r"workers=3 does not divide data\.lanes=16; nearest: 2 or 4"):
        of(world_size=3)
    with pytest.raises(ConfigError, match=r"data\.global_batch=64 is more than the 40 samples"):
        of("data.global_batch=64")
    with pytest.raises(ConfigError, match=r"train\.accumulate=3 is more than the 2 batches of an epoch"):
        of("train.accumulate=3")


def test_micro_batches_are_parts_of_every_lane() -> None:
    order = Order(np.arange(0, 201, 20), seed=0, global_batch=24, lanes=4, shuffle_window=10)
    assert plan.micro_batches(order, 8) == MicroBatches(lane_rows=6, num=3)
    for size, nearest in ((9, "8 or 12"), (16, "12 or 24"), (48, "24")):
        with pytest.raises(ConfigError, match=f"train.micro_batch={size}: .*data.lanes=4 .*nearest: {nearest}$"):
            plan.micro_batches(order, size)
