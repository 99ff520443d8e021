"""Where the steps of a run fall: optimiser steps, epochs, and what each rank asks of the loader."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from distssl.config import Run
from distssl.context import Context
from distssl.data.loader import Request
from distssl.data.order import Order
from distssl.data.shards import Dataset
from distssl.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """One optimiser step takes `accumulate` global batches, all of one epoch."""

    order: Order
    epochs: int
    accumulate: int

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

    def _replacement(self, epoch: int, batch: int, first_slot: int, index: int, attempt: int) -> int:
        return self.order.replacement(epoch, batch, first_slot + index, attempt)


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
    plan = Plan(order, run.train.epochs, run.train.accumulate)
    if not plan.steps_per_epoch:
        raise ConfigError(
            f"train.accumulate={run.train.accumulate} is more than the {order.steps_per_epoch} batches of an epoch"
        )
    return plan
