"""Training a task's network on labelled images, and its score: the same at any number of workers, before and after a
crash.

The loop is that of pretraining without what only pretraining needs: the same order, draws and graphs, DDP around a
module whose forward is its loss, global BatchNorm, and a learning rate that is a function of the step.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distssl import atomic, collectives, mirrored, monitor
from distssl.context import Context
from distssl.data.loader import Loader
from distssl.data.order import Order, nearest
from distssl.data.quarantine import Quarantine
from distssl.data.shards import Dataset
from distssl.downstream import features
from distssl.downstream.features import Extraction
from distssl.downstream.task import Network, Recipe
from distssl.errors import ConfigError, RunError
from distssl.nn import norm, optim, precision
from distssl.plan import LabelledStream

log = logging.getLogger(__name__)

RESULT, REPORTS = "result.json", "reports.jsonl"
TEST_BATCH = 64
WARMUP_SHARE = 0.1
CHECKPOINT_EVERY = 100  # steps
TELL_EVERY_S = 15.0
DRAWS = 0xF17  # keeps a fit's draws apart from pretraining's

Report = Callable[[int, int, dict[str, float]], None]  # step, of so many, metrics; every rank calls it


@dataclass(frozen=True)
class Job:
    """One network to train and to score. folder: its own, for checkpoints and the result."""

    title: str
    folder: Path
    train: Dataset
    train_ids: np.ndarray
    test: Dataset
    test_ids: np.ndarray
    seed: int


def batch_of(recipe: Recipe, num_labels: int, world_size: int) -> int:
    """Images a step over all ranks. Raises ConfigError where these cannot share them."""
    batch = recipe.batch
    if batch > num_labels:
        batch = 1 << (num_labels.bit_length() - 1)  # a power of two: most numbers of workers fit
    if batch == 1 and recipe.trained != "head":
        raise ConfigError(
            f"eval.fit.batch={recipe.batch}, for {num_labels} labels: BatchNorm cannot learn from one image a step; at "
            "least 2 labels and eval.fit.batch=2 are right"
        )
    if batch % world_size:
        fits = [num for num in range(1, batch + 1) if batch % num == 0]
        raise ConfigError(
            f"eval.fit.batch={batch}, for {num_labels} labels: {world_size} workers cannot share it; "
            f"nearest: {nearest(world_size, fits)}"
        )
    return batch


class Fitting:
    """A network on its way, at some step; takes up the newest checkpoint in the job's folder."""

    def __init__(self, network: Network, job: Job, how: Extraction, context: Context) -> None:
        self.job, self.how, self.context, self.recipe = job, how, context, network.how
        self.network = norm.placed(network, context.device, how.dtype)
        self.network.seed = job.seed
        self.known = network.annotations(job.train, job.train_ids)
        self.optimizer = optim.build(
            self.network, rate=network.rate, name="adamw", lr=self.recipe.lr, weight_decay=self.recipe.weight_decay
        )
        self.step = 0
        self.bad = Quarantine(f"{job.train.folder}, to train on", lasting=True)
        self.bad_of_test = Quarantine(f"{job.test.folder}, to test on", lasting=True)
        state = mirrored.newest(context, job.folder)
        if state is not None:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        self.model: nn.Module = self.network
        if context.world_size > 1:
            self.model = DistributedDataParallel(self.network, forward_sync_buffers=False)

    def run(self, report: Report | None = None, every: int | None = None) -> None:
        """Take the steps that are left. report: called with the score on the test images after each `every` steps.

        What was reported before the checkpoint is reported again, so a resumed job says what a whole one would.
        """
        if report:
            repeat_reports(self.job.folder, report, self.step)
        batches, told, started, first = self._batches(), time.monotonic(), time.monotonic(), self.step
        while self.step < self.recipe.steps:
            loss = self._take_step(next(batches))
            if self.context.rank == 0 and time.monotonic() - told > TELL_EVERY_S:
                told = time.monotonic()
                left_s = (told - started) / (self.step - first) * (self.recipe.steps - self.step)
                progress = f"step {self.step}/{self.recipe.steps}, loss {float(loss):.3f}, {left_s:.0f} s left"
                log.info("%s: %s", self.job.title, progress)
            last = self.step == self.recipe.steps
            due = bool(report and every and (last or self.step % every == 0))
            if due or last or self.step % CHECKPOINT_EVERY == 0:
                if not torch.isfinite(loss):
                    raise RunError(f"{self.job.title}: the loss is {float(loss)} at step {self.step}; try a lower lr")
                features.require_most(self.bad, len(self.job.train_ids), self.how)
                if due:
                    self._keep_report(self.score())
                self._checkpoint()
            if due and report:
                repeat_reports(self.job.folder, report, self.step, after=self.step - 1)

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """The metrics on the test images. Every rank calls it and gets them."""
        self.network.eval()
        mine = features.ids_of_rank(self.job.test_ids, TEST_BATCH, self.context)
        judged = [self.network.judge(batch, _of(self.known_of_test, batch)) for batch in self._test_batches(mine)]
        features.require_most(self.bad_of_test, len(self.job.test_ids), self.how)
        parts = collectives.gather_objects(judged)
        if not any(parts):
            raise ConfigError("eval.test_source: none of its images can be read")
        return type(self.network).score([batch for part in parts for batch in part])

    @torch.no_grad()
    def picture(self, num: int) -> list[Tensor]:
        """What the network makes of the first test images; of this rank alone, no collective."""
        self.network.eval()
        batches = self._test_batches(self.job.test_ids[:num])
        return [row for batch in batches for row in self.network.picture(batch, _of(self.known_of_test, batch))]

    @functools.cached_property
    def known_of_test(self) -> dict[int, Any]:
        """`annotations` of the test images; of this rank alone, no collective."""
        return self.network.annotations(self.job.test, self.job.test_ids)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        ids = self.job.train_ids
        batch = batch_of(self.recipe, len(ids), self.context.world_size)
        # A shard a label: an epoch leaves out what does not fill its last batch, and that should be others each time.
        order = Order(np.arange(len(ids) + 1), seed=self.job.seed, global_batch=batch, shuffle_window=len(ids))
        order.check_world_size(self.context.world_size)
        loader = Loader(
            self.job.train,
            functools.partial(type(self.network).views, self.recipe),
            seed=self.job.seed ^ DRAWS,
            batch_size=batch // self.context.world_size,
            threads=self.how.threads,
            device=self.context.device,
            max_pixels=self.how.max_pixels,
            quarantine=self.bad,
            target=self.network.target,
        )
        return loader.batches(LabelledStream(order, ids).requests(self.step, self.recipe.steps, self.context))

    def _test_batches(self, ids: np.ndarray) -> Iterator[dict[str, Tensor]]:
        views = functools.partial(type(self.network).test_views, self.recipe)
        found = features.batches(
            self.job.test, ids, views, self.how, self.context, self.bad_of_test,
            batch_size=TEST_BATCH, target=self.network.target,
        )  # fmt: skip
        return map(self._moved, found)

    def _take_step(self, views: dict[str, Tensor]) -> Tensor:
        self.model.train()
        self.network.step = self.step
        warmup = max(1, round(WARMUP_SHARE * self.recipe.steps))
        lr = optim.learning_rate(self.step, base=self.recipe.lr, total_steps=self.recipe.steps, warmup_steps=warmup)
        optim.set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        views = self._moved(views)
        with precision.autocast(self.how.dtype, self.context.device):
            loss = self.model(views, _of(self.known, views))
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    def _moved(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        views = {name: view.to(self.context.device) for name, view in views.items()}
        return views | {"image": views["image"].to(precision.parameter_dtype(self.how.dtype))}

    def _keep_report(self, metrics: dict[str, float]) -> None:
        """Before the checkpoint of its step is written; those of work that is done again are written over."""
        if self.context.rank == 0:
            path = self.job.folder / REPORTS
            before = [row for row in monitor.read_jsonl(path) if row["step"] < self.step]
            rows = [*before, {"step": self.step, "steps": self.recipe.steps, **metrics}]
            with atomic.replacing(path) as file:
                file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def _checkpoint(self) -> None:
        if self.context.rank == 0:
            state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
            mirrored.commit(self.job.folder, self.context.mirror, self.step, state, {}, keep_last=1, keep_best=None)
        collectives.barrier()


def result(folder: Path, context: Context) -> dict[str, float] | None:
    """The metrics of a finished job, None where it is not. Every rank calls it and gets them."""
    path, mirror = folder / RESULT, context.mirror
    if mirror:
        collectives.together(lambda: mirror.pull(mirror.name(folder)) if context.rank == 0 else None)
    return collectives.broadcast_object(json.loads(path.read_text()) if path.exists() else None)


def repeat_reports(folder: Path, report: Report, last: int | None = None, after: int = 0) -> None:
    """Report what a job has reported before, after a step and up to another. Every rank calls it."""
    for row in collectives.broadcast_object(monitor.read_jsonl(folder / REPORTS)):
        if after < row["step"] <= (row["steps"] if last is None else last):
            report(row.pop("step"), row.pop("steps"), row)


def finish(folder: Path, metrics: dict[str, float], context: Context, *, keeps_network: bool) -> None:
    """Keep the metrics of a finished job, and its checkpoint where that is read again. Every rank calls it."""
    if context.rank == 0:
        with atomic.replacing(folder / RESULT) as file:
            file.write_text(json.dumps(metrics, indent=1) + "\n")
        if context.mirror:
            context.mirror.push(context.mirror.name(folder))
    if not keeps_network:
        mirrored.remove_all(context, folder)
    collectives.barrier()


def _of(known: dict[int, Any], views: dict[str, Tensor]) -> list[Any]:
    """What is known of a batch's images."""
    return [known[sample] for sample in views["id"].tolist()] if known else []
