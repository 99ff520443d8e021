"""Where the steps of a run fall: optimiser steps, epochs, and what each rank asks of the loader."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from distssl.config import Run
from distssl.context import Context
from distssl.data import balanced_order, draws, held_out
from distssl.data.annotations import LABEL
from distssl.data.loader import Request
from distssl.data.order import Order, nearest
from distssl.data.shards import Dataset
from distssl.errors import ConfigError
from distssl.nn.micro_batches import MicroBatches

LABELLED = 0x1ABE1  # keeps the labelled stream's draws apart from the other's
COPY_BITS = 32  # above an epoch's number: keeps the draws of a sample's copies in one epoch apart


@dataclass(frozen=True)
class Plan:
    """One optimiser step takes `accumulate` global batches, all of one epoch."""

    order: Order
    epochs: int
    accumulate: int
    micro_batches: MicroBatches | None = None  # of the backbone; None: the whole batch at once

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch // self.accumulate

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def images_per_step(self) -> int:
        return self.order.global_batch * self.accumulate

    def epoch(self, step: int) -> int:
        """The epoch of an optimiser step, both from 0."""
        return step // self.steps_per_epoch

    def requests(self, start: int, context: Context) -> Iterator[Request]:
        """What this rank asks of the loader from optimiser step `start` on: `accumulate` requests a step."""
        rank, world_size = context.rank, context.world_size
        first_slot = rank * (self.order.global_batch // world_size)
        for step in range(start, self.total_steps):
            epoch, within = divmod(step, self.steps_per_epoch)
            for batch in range(within * self.accumulate, (within + 1) * self.accumulate):
                ids = self.order.rank_batch(epoch, batch, rank=rank, world_size=world_size)
                yield Request(ids, epoch, functools.partial(self._replacement, epoch, batch, first_slot))

    def balanced_requests(self, start: int, clusters: np.ndarray, context: Context) -> Iterator[Request]:
        """As `requests`, to the end of the epoch of step `start`, with as many samples of each cluster.

        clusters: int64 [num_samples], -1 for a sample to leave out. A sample drawn again has other draws.
        """
        rank, world_size = context.rank, context.world_size
        first_slot = rank * (self.order.global_batch // world_size)
        epoch, within = divmod(start, self.steps_per_epoch)
        ids = balanced_order.choose(clusters, seed=self.order.seed, epoch=epoch)
        epochs = epoch + (balanced_order.copies(ids) << COPY_BITS)
        order = self.order.among(ids)

        def replacement(batch: int, index: int, attempt: int) -> int:
            return int(ids[order.replacement(epoch, batch, first_slot + index, attempt)])

        for batch in range(within * self.accumulate, self.steps_per_epoch * self.accumulate):
            at = order.rank_batch(epoch, batch, rank=rank, world_size=world_size)
            yield Request(ids[at], epochs[at], functools.partial(replacement, batch))

    def _replacement(self, epoch: int, batch: int, first_slot: int, index: int, attempt: int) -> int:
        return self.order.replacement(epoch, batch, first_slot + index, attempt)


@dataclass(frozen=True)
class LabelledStream:
    """A second stream, of labelled images alone: a batch beside each of the plan's, in epochs of its own.

    order: of positions in ids. ids: int64 [num_labelled], the samples it is made of.
    """

    order: Order
    ids: np.ndarray

    def requests(self, start: int, stop: int, context: Context) -> Iterator[Request]:
        """What this rank asks of the loader for batches `start` to `stop`, counted from the start of the run."""
        rank, world_size = context.rank, context.world_size
        first_slot = rank * (self.order.global_batch // world_size)
        for nth in range(start, stop):
            epoch, batch = divmod(nth, self.order.steps_per_epoch)
            positions = self.order.rank_batch(epoch, batch, rank=rank, world_size=world_size)
            yield Request(self.ids[positions], epoch, functools.partial(self._replacement, epoch, batch, first_slot))

    def _replacement(self, epoch: int, batch: int, first_slot: int, index: int, attempt: int) -> int:
        return int(self.ids[self.order.replacement(epoch, batch, first_slot + index, attempt)])


def of_labelled(run: Run, dataset: Dataset, world_size: int) -> LabelledStream:
    """The labelled stream of a run, without the images that are held out of the same labels for the test.

    Raises ConfigError where there are too few labels or the sizes do not fit.
    """
    key = "data.labelled" if run.data.labelled else "data.source"
    ids = dataset.ids_with(LABEL)
    if learns_beside_its_test(run):
        ids, _ = held_out.split(ids)
        key += " (a fifth is held out for the test)"
    if run.data.num_labelled is not None:
        if run.data.num_labelled > len(ids):
            raise ConfigError(f"data.num_labelled={run.data.num_labelled} is more than the {len(ids)} labels of {key}")
        ids = np.sort(ids[np.argsort(draws.hash64(run.seed, LABELLED, ids), kind="stable")[: run.data.num_labelled]])
    if len(ids) < run.data.labelled_batch:
        raise ConfigError(f"data.labelled_batch={run.data.labelled_batch} is more than the {len(ids)} labels of {key}")
    order = Order(
        np.arange(len(ids) + 1),  # a shard a label: an epoch leaves out other ones each time
        seed=run.seed,
        global_batch=run.data.labelled_batch,
        shuffle_window=run.data.shuffle_window,
    )
    order.check_world_size(world_size)
    return LabelledStream(order, ids)


def learns_beside_its_test(run: Run) -> bool:
    """Whether the labelled stream and the test are parts of the same labels."""
    return is_tested_on(run, run.data.labelled or run.data.source)


def is_tested_on(run: Run, source: str) -> bool:
    """Whether the test is a part that is held out of a source's labels."""
    return run.eval.test_source is None and _same(run.eval.source or run.data.source, source)


def is_test(run: Run, source: str) -> bool:
    """Whether the test is a source, with all its labels."""
    return run.eval.test_source is not None and _same(run.eval.test_source, source)


def _same(a: str, b: str) -> bool:
    """Whether sources are one, as far as their names tell."""
    return a == b or os.path.realpath(a) == os.path.realpath(b)


def of_run(run: Run, dataset: Dataset, world_size: int) -> Plan:
    """Raises ConfigError where the sizes do not fit each other."""
    order = Order(
        dataset.shard_first,
        seed=run.seed,
        global_batch=run.data.global_batch,
        lanes=run.data.lanes,
        shuffle_window=run.data.shuffle_window,
    )
    order.check_world_size(world_size)
    size = run.train.micro_batch
    parts = micro_batches(order, size) if size else None
    plan = Plan(order, run.train.epochs, run.train.accumulate, parts)
    if not plan.steps_per_epoch:
        raise ConfigError(
            f"train.accumulate={run.train.accumulate} is more than the {order.steps_per_epoch} batches of an epoch"
        )
    return plan


def micro_batches(order: Order, size: int) -> MicroBatches:
    """The parts of `size` images that a global batch falls into. Raises ConfigError where it cannot."""
    fits = [order.lanes * rows for rows in range(1, order.per_lane + 1) if order.per_lane % rows == 0]
    if size not in fits:
        raise ConfigError(
            f"train.micro_batch={size}: a multiple of data.lanes={order.lanes} that divides "
            f"data.global_batch={order.global_batch} is right; nearest: {nearest(size, fits)}"
        )
    return MicroBatches(order.per_lane, order.global_batch // size)
