"""The model of a step at W workers: its closed forms, and gloo's ring walked through segment by segment."""

from __future__ import annotations

import itertools
import math

import pytest

from distssl import estimate
from distssl.estimate import Collective, Links, Measured, Timing

LINKS = Links(alpha_s=1e-3, beta_s=8e-9)  # 1 Gbit/s
SIZES = (1_000, 300_000, 1 << 20, 5_000_003, 100_000_000)
ALONE = Timing(images=64, beside=1, load_s=0.1, compute_s=0.6, step_s=0.7)


def walked(chunk_bytes: float, world_size: int, links: Links) -> float:
    """Seconds of a phase of gloo's ring: every segment starts when the one before is out and the one before that in."""
    num_segments = max(2, math.ceil(chunk_bytes / 2**20))
    segment_s = chunk_bytes / num_segments * links.beta_s
    out_s, in_s = [0.0], [0.0, 0.0]
    for _ in range((world_size - 1) * num_segments):
        start_s = max(out_s[-1], in_s[-2])
        out_s.append(start_s + segment_s)
        in_s.append(start_s + segment_s + links.alpha_s)
    return in_s[-1]


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8, 64])
def test_collectives_take_what_a_walk_through_their_segments_does(world_size: int) -> None:
    for size, alpha_s in itertools.product(SIZES, (0.0, 1e-5, 1e-3, 0.05)):
        links = Links(alpha_s, 8e-9)
        reduced, gathered = (f(size, world_size, links) for f in (estimate.all_reduce_s, estimate.all_gather_s))
        assert reduced == pytest.approx(2 * walked(size / world_size, world_size, links), rel=1e-9)
        assert gathered == pytest.approx(walked(size, world_size, links), rel=1e-9)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_where_only_messages_or_only_bytes_count_an_all_reduce_is_the_textbooks_ring(world_size: int) -> None:
    hops = 2 * (world_size - 1)
    for size in SIZES:
        assert estimate.all_reduce_s(size, world_size, Links(0, 8e-9)) == pytest.approx(hops / world_size * size * 8e-9)
    assert estimate.all_reduce_s(4, world_size, Links(1e-3, 0)) == pytest.approx(hops * 1e-3)
    assert estimate.all_gather_s(4, world_size, Links(1e-3, 0)) == pytest.approx((world_size - 1) * 1e-3)


def test_alpha_and_beta_are_found_again_from_times_at_two_and_four() -> None:
    for truth in (LINKS, Links(20e-6, 1e-10), Links(5e-3, 8e-8)):
        measured = [Measured(n, w, estimate.all_reduce_s(n, w, truth)) for n in SIZES for w in (2, 4)]
        found = estimate.fit_links(measured)
        assert found.alpha_s == pytest.approx(truth.alpha_s, rel=1e-3)
        assert found.beta_s == pytest.approx(truth.beta_s, rel=1e-3)
    with pytest.raises(ValueError, match="a small and a large one"):
        estimate.fit_links([Measured(4, 2, 1.0)])


def test_a_network_of_one_gbit_takes_eight_nanoseconds_a_byte() -> None:
    assert Links.of_network(1, 1e-3) == LINKS


def test_one_worker_exchanges_nothing() -> None:
    blocking = [Collective("all_reduce", 4096), Collective("all_gather", 10**6)]
    step = estimate.step(ALONE, 1, LINKS, gradient_bytes=10**8, blocking=blocking)
    assert (step.exchange_s, step.step_s) == (0.0, ALONE.step_s)
    assert step.images_per_s == pytest.approx(64 / 0.7)


def test_the_gradient_hides_behind_the_backward_pass_but_for_its_last_bucket() -> None:
    gradient_bytes = (1 + 25 + 5) << 20
    last_s = estimate.all_reduce_s(5 << 20, 4, LINKS)
    long = Timing(64, 1, load_s=0.1, compute_s=100.0, step_s=100.0)
    assert estimate.step(long, 4, LINKS, gradient_bytes=gradient_bytes).exposed_s == pytest.approx(last_s)
    open_ = estimate.step(long, 4, LINKS, gradient_bytes=gradient_bytes, overlap=False)
    parts = (estimate.all_reduce_s(part << 20, 4, LINKS) for part in (1, 25, 5))
    assert open_.exposed_s == pytest.approx(sum(parts)) == pytest.approx(open_.gradient_s)
    short = Timing(64, 1, load_s=0.0, compute_s=0.0, step_s=0.0)
    assert estimate.step(short, 4, LINKS, gradient_bytes=gradient_bytes).exposed_s == pytest.approx(open_.gradient_s)


def test_a_step_of_several_batches_exchanges_its_gradient_once() -> None:
    blocking = [Collective("all_gather", 1000)] * 3
    once, thrice = (
        estimate.step(ALONE, 2, LINKS, gradient_bytes=1000, blocking=blocking, accumulate=n, overlap=False)
        for n in (1, 3)
    )
    assert thrice.images == 3 * once.images == 3 * 2 * 64
    assert thrice.gradient_s == once.gradient_s
    assert once.blocking_s == pytest.approx(3 * estimate.all_gather_s(1000, 2, LINKS))
    assert thrice.step_s - thrice.exposed_s == pytest.approx(3 * (once.step_s - once.exposed_s))


@pytest.mark.parametrize("gradient_bytes", [5, 1 << 20, (1 << 20) + 1, 100_000_000])
def test_buckets_hold_the_gradient_once(gradient_bytes: int) -> None:
    buckets = estimate.gradient_buckets(gradient_bytes)
    assert sum(buckets) == gradient_bytes
    assert buckets[0] <= 1 << 20
    assert max(buckets) <= 25 << 20
    assert min(buckets) > 0


def test_what_takes_longest_is_the_limit() -> None:
    reading = Timing(8, 1, load_s=2.0, compute_s=1.0, step_s=2.0)
    assert estimate.step(reading, 2, LINKS, gradient_bytes=4).bottleneck == "reading"
    assert estimate.step(ALONE, 2, LINKS, gradient_bytes=4).bottleneck == "compute"
    assert estimate.step(ALONE, 2, LINKS, gradient_bytes=10**9).bottleneck == "all-reduce"


def test_a_batch_size_between_two_measured_ones_lies_on_their_line() -> None:
    timings = [Timing(n, r, 0.01 * n, 0.1 + 0.02 * n, 0.1 + 0.02 * n + r) for n in (16, 32, 128) for r in (1, 4)]
    for images, beside in itertools.product((8, 16, 24, 64, 256), (1, 4)):
        found = estimate.alone(timings, images, beside)
        assert found.beside == beside
        assert found.compute_s == pytest.approx(0.1 + 0.02 * images)
        assert found.step_s == pytest.approx(0.1 + 0.02 * images + beside)
    assert estimate.alone(timings, 32, 2).beside == 1  # of two nothing was measured
    assert estimate.alone(timings[:1], 32, 1).load_s == pytest.approx(0.32)


def test_cost_is_hours_times_price() -> None:
    hours = estimate.hours(num_steps=7200, step_s=0.5)
    assert hours == 1.0
    assert estimate.cost(hours, 3.25) == 3.25
    assert estimate.cost(hours, None) is None
