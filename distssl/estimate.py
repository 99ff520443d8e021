"""How long a step takes at another number of workers: a step measured alone, plus what the ranks must tell each other.

    step(W) = alone(B / W images, R ranks on its machine) + blocking(W) + what of the gradient's all-reduce is left over

alone is measured (`calibrate`), with R ranks side by side as there will be on a machine, for they share its cores, its
memory and its clock. The other two follow from the bytes of each collective and a line with two numbers (R. Hockney,
The communication challenge for MPP, Parallel Computing 1994): alpha, the time a message takes that holds nothing, and
beta, what a byte adds. Numbers in, numbers out: nothing here measures or talks to another rank.

gloo's collectives go around a ring (gloo/allreduce.cc, `ring`). A phase passes every rank's chunk on W - 1 times, cut
into k >= 2 segments of s <= 1 MiB, two of them under way at once. So a segment starts when the one before it has left
and the one before that has come in, and m = (W - 1) k segments take

    phase = max(alpha + m s beta,  m / 2 (alpha + s beta) + s beta)                                     (m even)

the first where the bytes of a segment take longer than a message's way, the second where they do not. An all-reduce is
two phases over chunks of n / W bytes, an all-gather one over each rank's n. The textbook's all-reduce, 2 (W - 1) (alpha
+ n beta / W), counts alpha as the second does and bytes as the first; where both matter gloo hides the smaller one.
alpha is a whole handshake: gloo sends a segment when the receiver has said that it waits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

SEGMENT_BYTES = 1 << 20  # at most, gloo's kMaxSegmentSize
FEWEST_SEGMENTS = 2  # of a chunk
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20  # of DistributedDataParallel's gradients, the last layers' first
BACKWARD_SHARE = 2 / 3  # of a step: a backward pass is two products where a forward pass is one

Bottleneck = Literal["reading", "compute", "all-reduce"]


@dataclass(frozen=True)
class Links:
    """alpha_s: a message's way and handshake. beta_s: seconds a byte, each rank sending to one while another sends."""

    alpha_s: float
    beta_s: float

    @classmethod
    def of_network(cls, gbit_per_s: float, alpha_s: float) -> Links:
        """What a network of this rate would do if nothing else were on it."""
        return cls(alpha_s, 8e-9 / gbit_per_s)


@dataclass(frozen=True)
class Collective:
    """One that a step waits for. num_bytes: of each rank's tensor."""

    kind: Literal["all_reduce", "all_gather"]
    num_bytes: int

    def seconds(self, world_size: int, links: Links) -> float:
        return (all_reduce_s if self.kind == "all_reduce" else all_gather_s)(self.num_bytes, world_size, links)


@dataclass(frozen=True)
class Measured:
    """One all-reduce as it was timed."""

    num_bytes: int
    world_size: int
    seconds: float


def all_reduce_s(num_bytes: float, world_size: int, links: Links) -> float:
    """Seconds until every rank has the sum of tensors of so many bytes."""
    return 2 * _phase_s(num_bytes / world_size, world_size, links)


def all_gather_s(num_bytes: float, world_size: int, links: Links) -> float:
    """Seconds until every rank has every rank's tensor of so many bytes."""
    return _phase_s(num_bytes, world_size, links)


def _phase_s(chunk_bytes: float, world_size: int, links: Links) -> float:
    if world_size == 1:
        return 0.0
    per_chunk = max(FEWEST_SEGMENTS, math.ceil(chunk_bytes / SEGMENT_BYTES))
    segment_s = chunk_bytes / per_chunk * links.beta_s
    num = (world_size - 1) * per_chunk
    back_to_back_s = links.alpha_s + num * segment_s
    in_pairs_s = math.ceil(num / 2) * (links.alpha_s + segment_s) + (0.0 if num % 2 else segment_s)
    return max(back_to_back_s, in_pairs_s)


def fit_links(measured: Sequence[Measured]) -> Links:
    """The alpha and beta that come closest to what was measured, by the squares of relative errors.

    Needs a small and a large tensor. Raises ValueError for fewer than two measurements.
    """
    from scipy import optimize

    if len(measured) < 2:
        raise ValueError(
            f"{len(measured)} all-reduces tell nothing of alpha and beta; a small and a large one are right"
        )

    def errors(logs: np.ndarray) -> list[float]:
        links = Links(*np.exp(logs))
        return [all_reduce_s(one.num_bytes, one.world_size, links) / one.seconds - 1 for one in measured]

    smallest = min(measured, key=lambda one: one.num_bytes)
    largest = max(measured, key=lambda one: one.num_bytes)
    # Where each is the only one that matters.
    alpha_s = smallest.seconds / (2 * (smallest.world_size - 1))
    beta_s = largest.seconds * largest.world_size / (2 * (largest.world_size - 1) * largest.num_bytes)
    return Links(*map(float, np.exp(optimize.least_squares(errors, np.log([alpha_s, beta_s])).x)))


@dataclass(frozen=True)
class Timing:
    """Seconds a batch of one rank of W that waits for no other, `beside` such ranks at work on the machine at once.

    load_s: reading and decoding alone. compute_s: forward, backward and optimiser alone, views in memory. step_s: both
    as they run, one ahead of the other.
    """

    images: int  # N
    beside: int  # R
    load_s: float
    compute_s: float
    step_s: float


def alone(timings: Sequence[Timing], images: int, beside: int) -> Timing:
    """The timing of a rank with N `images` and R - 1 others on its machine, on the line through the nearest two N.

    Those measured with the largest number of ranks that is at most R count. From one N alone: in proportion.
    """
    shared = max((one.beside for one in timings if one.beside <= beside), default=min(one.beside for one in timings))
    points = sorted((one for one in timings if one.beside == shared), key=lambda one: one.images)
    nearest = sorted(points, key=lambda one: abs(math.log(one.images / images)))[:2]
    a, b = nearest[0], nearest[-1]

    def at(name: str) -> float:
        ya, yb = getattr(a, name), getattr(b, name)
        if a.images == b.images:
            return ya * images / a.images
        slope = max(0.0, (yb - ya) / (b.images - a.images))  # noise makes no batch faster for being larger
        return max(ya + slope * (images - a.images), ya * min(1.0, images / a.images) / 2)

    return Timing(images, shared, at("load_s"), at("compute_s"), at("step_s"))


@dataclass(frozen=True)
class Prediction:
    """One optimiser step at W workers, and where its seconds go; each of one rank."""

    world_size: int
    images: int  # of all ranks
    step_s: float
    load_s: float
    compute_s: float
    blocking_s: float  # waiting for collectives inside forward and backward
    gradient_s: float  # the gradient's all-reduce
    exposed_s: float  # of it, not hidden behind the backward pass

    @property
    def images_per_s(self) -> float:
        return self.images / self.step_s

    @property
    def exchange_s(self) -> float:
        """What the ranks wait for each other's numbers."""
        return self.blocking_s + self.exposed_s

    @property
    def bottleneck(self) -> Bottleneck:
        """What would have to be faster first; reading is decoding and augmenting too."""
        if self.exchange_s > max(self.load_s, self.compute_s):
            return "all-reduce"
        return "reading" if self.load_s > self.compute_s else "compute"


def step(
    timing: Timing,
    world_size: int,
    links: Links,
    *,
    gradient_bytes: int,
    blocking: Sequence[Collective] = (),
    accumulate: int = 1,
    overlap: bool = True,
) -> Prediction:
    """What a step of `accumulate` batches takes, of timing.images on each of W ranks.

    overlap: whether the gradient travels beside the backward pass; not where what carries it needs the ranks' own
    cores. Gradients travel once a step, `blocking` once a batch.
    """
    blocking_s = accumulate * sum(one.seconds(world_size, links) for one in blocking)
    buckets = gradient_buckets(gradient_bytes)
    bucket_s = [all_reduce_s(size, world_size, links) for size in buckets]
    gradient_s = sum(bucket_s)
    # The first layers' bucket is full when the backward pass is over. The others had all of it but its own share.
    room_s = BACKWARD_SHARE * timing.compute_s * (1 - buckets[-1] / gradient_bytes) if overlap else 0.0
    exposed_s = max(bucket_s[-1], gradient_s - room_s)
    return Prediction(
        world_size=world_size,
        images=accumulate * timing.images * world_size,
        step_s=accumulate * timing.step_s + blocking_s + exposed_s,
        load_s=accumulate * timing.load_s,
        compute_s=accumulate * timing.compute_s,
        blocking_s=blocking_s,
        gradient_s=gradient_s,
        exposed_s=exposed_s,
    )


def gradient_buckets(gradient_bytes: int) -> list[int]:
    """The bytes DistributedDataParallel sends at a time, in their order."""
    sizes = [min(gradient_bytes, FIRST_BUCKET_BYTES)]
    while (left := gradient_bytes - sum(sizes)) > 0:
        sizes.append(min(left, BUCKET_BYTES))
    return sizes


def hours(num_steps: int, step_s: float) -> float:
    return num_steps * step_s / 3600


def cost(hours: float, usd_per_hour: float | None) -> float | None:
    """US dollars; None where the price is not known."""
    return None if usd_per_hour is None else hours * usd_per_hour
