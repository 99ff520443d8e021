"""What ranks tell each other in a step, and how fast: counted as they do it, timed while they load images.

For `calibrate`, in each of two gloo ranks on one machine.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable, Iterator

import torch

from distssl import background, collectives, estimate
from distssl.estimate import Collective, Links, Measured

KINDS = {"gloo:all_reduce": "all_reduce", "gloo:all_gather": "all_gather"}
# Bytes, from where alpha decides to where beta does, and how many: of the small ones a few take most of the time, where
# others want the same cores.
REDUCED = ((1 << 10, 300), (1 << 16, 200), (1 << 20, 40), (1 << 23, 10))


def count(act: Callable[[], object]) -> tuple[Collective, ...]:
    """What `act` sends, as gloo tells torch's profiler. Of four bytes a number: where it is eight, alpha decides."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it says on stderr when it begins, and that there is no GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        act()
    return tuple(
        Collective(KINDS[event.name], 4 * int(torch.Size(event.input_shapes[0]).numel()))  # pyright: ignore
        for event in profile.events() or ()
        if event.name in KINDS
    )


def measure_links(batches: Iterator[object]) -> Links:
    """alpha and beta between the ranks while each loads `batches`, as ranks that train do: on cores that have nothing
    else to do a small all-reduce takes an eighth of the time. Every rank calls it."""
    with background.beside(functools.partial(_load, batches), "loading"):
        return estimate.fit_links([Measured(num_bytes, 2, _reduce_s(num_bytes, times)) for num_bytes, times in REDUCED])


def _load(batches: Iterator[object], done: threading.Event) -> None:
    while not done.is_set():
        next(batches)


def _reduce_s(num_bytes: int, times: int) -> float:
    """Mean seconds of an all-reduce."""
    x, total_s = torch.ones(num_bytes // 4), 0.0
    for _ in range(times):
        collectives.barrier()
        started = time.perf_counter()
        collectives.sum_(x)
        total_s += time.perf_counter() - started
    return total_s / times
