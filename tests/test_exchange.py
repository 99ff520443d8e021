"""Collectives are timed as ranks meet them: beside the loading, and with the few that take long."""

from __future__ import annotations

import itertools
import time

import pytest

from distssl import collectives, exchange

SLOW_S, ONE_IN = 0.02, 10


@pytest.fixture
def now_and_then_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def reduce(x: object) -> object:
        if next(calls) % ONE_IN == 0:
            time.sleep(SLOW_S)
        return x

    monkeypatch.setattr(collectives, "sum_", reduce)


@pytest.mark.usefixtures("now_and_then_slow")
def test_an_all_reduce_takes_what_it_takes_in_the_mean() -> None:
    assert exchange._reduce_s(4, 5 * ONE_IN) >= SLOW_S / ONE_IN


@pytest.mark.usefixtures("now_and_then_slow")
def test_batches_are_loaded_as_long_as_all_reduces_are_timed() -> None:
    loaded: list[float] = []

    def batches():
        while True:
            time.sleep(SLOW_S)
            loaded.append(time.monotonic())
            yield

    started = time.monotonic()
    links = exchange.measure_links(batches())
    ended = time.monotonic()
    assert links.alpha_s > 0
    num_slow = sum(times for _, times in exchange.REDUCED) // ONE_IN
    assert len(loaded) >= num_slow / 2  # each takes as long as a batch
    assert started < loaded[0]
    time.sleep(2 * SLOW_S)
    assert loaded[-1] <= ended
