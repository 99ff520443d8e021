"""The batches of views a rank trains on: of images, and beside them of labelled images where the method wants those."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from distssl import plan
from distssl.config import Run
from distssl.context import Context
from distssl.data import quarantine
from distssl.data.loader import Loader, Request
from distssl.data.quarantine import Quarantine
from distssl.data.shards import Dataset
from distssl.method import Method
from distssl.plan import Plan

Batches = Iterator[dict[str, Tensor]]


def of_run(
    run: Run,
    method: Method,
    data: Dataset,
    labelled: Dataset | None,
    planned: Plan,
    step: int,
    context: Context,
    bad: Quarantine,
) -> Batches:
    """All the views of a rank from an optimiser step on, `accumulate` batches a step."""
    ours = of_images(run, method, data, planned, step, context, bad)
    return ours if labelled is None else beside(ours, of_labels(run, method, labelled, planned, step, context, bad))


def of_images(
    run: Run, method: Method, dataset: Dataset, planned: Plan, step: int, context: Context, bad: Quarantine
) -> Batches:
    """The method's views from an optimiser step on, `accumulate` batches a step."""
    views = functools.partial(type(method).views, method.cfg)
    size = run.data.global_batch // context.world_size
    load = functools.partial(_loaded, run, dataset, views, target="mask" if method.reads_masks(method.cfg) else None)
    if not method.balances_clusters:
        return load(planned.requests(step, context), size, context, bad)
    return _epoch_by_epoch(
        lambda at: load(planned.balanced_requests(at, _clusters(method), context), size, context, bad), planned, step
    )


def _epoch_by_epoch(rest_of_epoch: Callable[[int], Batches], planned: Plan, step: int) -> Batches:
    """Batches from a step on, each epoch's asked for when its first is due: before that it has no clusters."""
    while step < planned.total_steps:
        yield from rest_of_epoch(step)
        step = (planned.epoch(step) + 1) * planned.steps_per_epoch


def _clusters(method: Method) -> np.ndarray:
    clusters = method.clusters()
    assert clusters is not None
    return clusters.cpu().numpy()


def of_labels(
    run: Run, method: Method, dataset: Dataset, planned: Plan, step: int, context: Context, bad: Quarantine
) -> Batches:
    """The method's labelled views, a batch for each of `of_images`. Raises ConfigError where labels are too few."""
    views = functools.partial(type(method).labelled_views, method.cfg)
    stream = plan.of_labelled(run, dataset, context.world_size)
    first, last = (at * planned.accumulate for at in (step, planned.total_steps))
    size = run.data.labelled_batch // context.world_size
    requests = stream.requests(first, last, context)
    bad = bad.of(quarantine.LABELLED) if run.data.labelled else bad
    return _loaded(run, dataset, views, requests, size, context, bad, word=plan.LABELLED)


def check_shares(
    run: Run, bad: Quarantine, data: Dataset, labelled: Dataset | None, num_batches: int, whole: bool
) -> None:
    """Raises RunError where too many images of a dataset are bad, after so many global batches. whole: saw all data."""
    of_data = data.num_samples if whole else min(num_batches * run.data.global_batch, data.num_samples)
    quarantine.check_share(bad, of_data, data.num_samples, run.data.max_bad_fraction)
    if labelled and run.data.labelled:
        of_labels = min(num_batches * run.data.labelled_batch, labelled.num_samples)
        bad = bad.of(quarantine.LABELLED)
        quarantine.check_share(bad, of_labels, labelled.num_samples, run.data.max_bad_fraction)


def beside(images: Batches, labelled: Batches) -> Batches:
    """Both streams' views in one dict, the labelled ones' names after "labelled."."""
    for ours, theirs in zip(images, labelled, strict=True):
        yield ours | {f"labelled.{name}": view for name, view in theirs.items()}


def _loaded(
    run: Run,
    dataset: Dataset,
    views: Callable[[Any], dict[str, Any]],
    requests: Iterator[Request],
    batch_size: int,
    context: Context,
    bad: Quarantine,
    word: int = 0,
    target: str | None = None,
) -> Batches:
    """word: keeps the draws of two streams apart, which may share images. target: what the views read beside."""
    loader = Loader(
        dataset,
        views,
        seed=run.seed ^ word,
        batch_size=batch_size,
        threads=run.machine.threads,
        prefetch=run.machine.prefetch,
        device=context.device,
        max_pixels=run.data.max_pixels,
        quarantine=bad,
        target=target,
    )
    return loader.batches(requests)
