"""The loop: batches of views -> loss -> gradient -> parameters, the same at any number of workers.

What happens at a step is a function of the config and of (seed, epoch, step); what is not, of the machines, is in the
context. A resumed run takes the same path as one that was never stopped.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from distssl import checkpoint, collectives, config, epoch_start, method, mirrored, monitor, plan, streams, window
from distssl.config import Run
from distssl.context import Context
from distssl.data import quarantine
from distssl.data.shards import Dataset
from distssl.guard import Guard
from distssl.lookout import Lookout
from distssl.nn import backbones, diagnostics, norm, optim, precision
from distssl.weights import Weights

log = logging.getLogger(__name__)

Probe = Callable[[backbones.Backbone], dict[str, float]]  # backbone -> metrics; every rank calls it

Elsewhere = Callable[[dict[str, torch.Tensor]], dict[str, float]]  # a backbone's state -> metrics; picklable


class Training:
    """One run on this rank, at some optimiser step.

    Takes up the newest checkpoint in the run folder. Raises ConfigError where the folder holds another run or the
    sizes do not fit the number of workers.
    """

    def __init__(
        self,
        run: Run,
        context: Context,
        dataset: Dataset,
        probe: Probe | None = None,
        labelled: Dataset | None = None,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self.cfg = run
        self.context = context
        self.dataset = dataset
        self.labelled = labelled
        self.probe = probe
        self.elsewhere = elsewhere  # the same for another process
        self.plan = plan.of_run(run, dataset, context.world_size)
        self.warmup_steps = round(run.train.warmup_epochs * self.plan.steps_per_epoch)
        self.quarantine = quarantine.Quarantine()
        precision.speed_up_float32_matmul(context.device)
        state = mirrored.newest(context, context.run_dir)
        began = state.get("precision") if state else None
        self.dtype = precision.kept(began, run.train.precision, context.device)
        start = None if state else Weights.kept(run.model, context)
        self.method = norm.placed(method.build(run, start), context.device, self.dtype)
        if self.plan.micro_batches:
            self.method.take_parts(self.plan.micro_batches)
        self.optimizer = optim.build(
            self.method,
            rate=self.method.rate,
            name=run.train.optimizer,
            lr=run.train.lr,
            weight_decay=run.train.weight_decay,
            momentum=run.train.momentum,
        )
        self.step = 0  # optimiser steps done
        self.metrics: dict[str, float] = {}  # the latest of each
        self.news: dict[str, float] = {}  # of the epoch's start; logged after its first step
        if state is not None:
            self._resume(state)
        self.model: torch.nn.Module = self.method
        if context.world_size > 1:
            # BatchNorm's statistics are global already, so there are no buffers to broadcast.
            self.model = DistributedDataParallel(self.method, forward_sync_buffers=False)
        self.window = window.Window()
        self.guard = Guard(run.train.on_collapse, self.warmup_steps, tells=context.rank == 0)
        self.lookout = Lookout(context, self.step)
        self.monitor = monitor.Monitor(context.run_dir, self.step) if context.rank == 0 else None
        if self.monitor:  # what a run that was killed had found and not yet told
            self.monitor.quarantine(list(self.quarantine.entries.values()))

    def run(self) -> bool:
        """Take the steps that are left; False where somebody asked to stop before the end, or a host goes."""
        if self.monitor and self.step == 0:
            self.monitor.text("config", config.dump(self.cfg))
        try:
            batches = self.batches()
            self.window.reset()
            stop = False
            while self.step < self.plan.total_steps and not stop:
                self.take_step(batches)
                stop = self._after_step()
            self._take_evaluations(wait=True)
            return not stop
        finally:
            self.close()

    def close(self) -> None:
        """Write out what the monitor still holds."""
        if self.monitor:
            self.monitor.close()

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's views from the next step on, `accumulate` batches a step."""
        data, of_rank = (self.dataset, self.labelled), (self.context, self.quarantine)
        return streams.of_run(self.cfg, self.method, *data, self.plan, self.step, *of_rank)

    def start_epoch(self) -> None:
        """What comes before an epoch's first step and its batches; `take_step` calls it. Every rank does."""
        self.method.epoch = self.plan.epoch(self.step)
        place = self.dataset, self.context, self.quarantine, self.monitor
        with self.window.paused():
            self.news = epoch_start.run(self.cfg, self.dtype, self.method, self.optimizer, self.step, *place)

    def take_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> None:
        """One optimiser step: `accumulate` batches forward and backward, then the update."""
        cfg = self.cfg.train
        self.method.epoch, self.method.num_steps = self.plan.epoch(self.step), self.step
        self.method.progress = self.step / self.plan.total_steps
        if self.step % self.plan.steps_per_epoch == 0:
            self.start_epoch()
        self.model.train()
        self.metrics["lr"] = optim.learning_rate(
            self.step, base=cfg.lr, total_steps=self.plan.total_steps, warmup_steps=self.warmup_steps
        )
        optim.set_learning_rate(self.optimizer, self.metrics["lr"])
        self.optimizer.zero_grad(set_to_none=True)
        ids = []
        for nth in range(cfg.accumulate):
            with self.window.waiting():
                views = next(batches)
            ids.append(views["id"])
            with self._synchronised(nth == cfg.accumulate - 1):
                with precision.autocast(self.dtype, self.context.device):
                    outputs = self.model(self._moved(views))
                (outputs["loss"] / cfg.accumulate).backward()
            self.window.add(outputs, views)
        if cfg.clip_norm is not None or self._is_logged(self.step + 1):
            self.window.gradient_norm = optim.clip_gradient(self.model.parameters(), cfg.clip_norm)
        self.optimizer.step()
        self.step += 1
        self.method.on_step_end(self.step / self.plan.total_steps)
        if self.cfg.machine.ledger:
            self._write_ledger(torch.stack(ids))

    def _moved(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Views on the device, images in the parameters' dtype; without a copy where they are."""
        dtype, device = precision.parameter_dtype(self.dtype), self.context.device
        return {
            name: view.to(device, dtype if view.is_floating_point() else None, non_blocking=True)
            for name, view in views.items()
        }

    def _synchronised(self, last: bool) -> Any:
        """DDP averages gradients in the last backward pass of an optimiser step alone."""
        return self.model.no_sync() if isinstance(self.model, DistributedDataParallel) and not last else nullcontext()

    def _after_step(self) -> bool:
        """Log, evaluate and checkpoint when it is time; whether to stop before the end."""
        last = self.step == self.plan.total_steps
        due = self.cfg.eval.every and self.step % (self.cfg.eval.every * self.plan.steps_per_epoch) == 0
        logged = self._is_logged(self.step)
        if logged:
            self._log()
        stop = not last and (logged or self.step == self.lookout.due) and self.lookout.look(self.step)
        if self.probe and (due or last):
            self._probe()
        if due or last or stop or self.step % self.cfg.checkpoint.every == 0:
            self._checkpoint()
        return stop

    def _is_logged(self, step: int) -> bool:
        """Whether the window ends after so many steps, the next of them or the last."""
        return step % self.cfg.train.log_every == 0 or step == self.plan.total_steps or bool(self.news)

    def _probe(self) -> None:
        """Evaluate the backbone as it is, beside the training where there is room for it."""
        assert self.probe
        backbone = self.method.evaluated()
        if self.elsewhere:
            state = checkpoint.snapshot(backbone.state_dict()) if self.context.rank == 0 else {}
            if self.context.beside(functools.partial(self.elsewhere, state), self.step):
                return
        with self.window.paused():
            self._record(self.probe(backbone))

    def _take_evaluations(self, wait: bool = False) -> None:
        """Log what evaluations beside the training have found, at the steps they are of."""
        for step, metrics in self.context.evaluated(wait):
            if self.monitor:
                self.monitor.log(step, metrics)
                self.context.record(step, metrics)
                mirrored.add_metrics(self.context.run_dir, self.context.mirror, step, metrics)

    def _log(self) -> None:
        """Log the window's means over all ranks. Every rank calls it."""
        seconds = self.window.seconds()
        figures = self.window.figures() | self.dataset.take_figures()
        steps_per_s = self.window.num_batches / self.cfg.train.accumulate / seconds
        outputs, views = self.window.outputs, self.window.views
        self.window.reset()  # here, so that the time logging takes is counted too
        fresh = self.quarantine.take_fresh()
        sums = collectives.sum_(torch.tensor([*figures.values(), len(fresh)], dtype=torch.float64)).tolist()
        figures = {name: total / self.context.world_size for name, total in zip(figures, sums[:-1], strict=True)}
        if sums[-1]:
            self._share_quarantine(fresh)
        self.guard.require_numbers(self.step, figures)
        embeddings = outputs.get("embeddings")  # [V, N, D]
        if embeddings is not None:
            za, zb = (collectives.gather_no_grad(z.float()) for z in embeddings[:2])  # [B, D] each
            figures |= {name: value.item() for name, value in diagnostics.of_embeddings(za, zb).items()}
        self.guard.look(self.step, figures)
        news, self.news = self.news, {}
        first = "loss" not in self.metrics
        self._take_evaluations()
        self._record(
            figures
            | news
            | {
                "lr": self.metrics["lr"],
                "epoch": self.step / self.plan.steps_per_epoch,
                "images_per_s": steps_per_s * self.plan.images_per_step,
                "eta_s": (self.plan.total_steps - self.step) / steps_per_s,
                "total_steps": self.plan.total_steps,
                "num_bad": len(self.quarantine.entries),
            }
        )
        if first and self.context.rank == 0:
            checkpoint.warn_of_unknown(self.cfg.checkpoint.keep_best, self.metrics)
        if self.monitor and self.step % self.plan.steps_per_epoch < self.cfg.train.log_every:
            shown = {name: view[: monitor.NUM_PICTURES] for name, view in views.items()}
            with torch.no_grad(), precision.autocast(self.dtype, self.context.device):
                self.monitor.pictures(self.method.eval().picture(self._moved(shown)), self.step)

    def _record(self, metrics: dict[str, float]) -> None:
        self.metrics |= metrics
        if self.monitor:
            self.monitor.log(self.step, metrics)
        self.context.record(self.step, metrics)

    def _share_quarantine(self, fresh: list[quarantine.Entry]) -> None:
        """Tell every rank of the others' bad samples. Raises RunError on all where they are too many."""
        for entries in collectives.gather_objects(fresh):
            self.quarantine.merge(entries)
            if self.monitor:
                self.monitor.quarantine(entries)
        num_batches = self.step * self.cfg.train.accumulate
        data = self.dataset, self.labelled
        streams.check_shares(self.cfg, self.quarantine, *data, num_batches, whole=self.method.embeds)

    def _checkpoint(self) -> None:
        """Take the state now, write it in the background. Every rank calls it."""
        self.guard.require_finite(self.step, self.method)
        metrics, place = dict(self.metrics), (self.context.run_dir, self.context.mirror)
        state = self._state() if self.context.rank == 0 else {}
        keep = self.cfg.checkpoint.keep_last, self.cfg.checkpoint.keep_best, self.context.pending()
        self.context.commit(functools.partial(mirrored.commit, *place, self.step, state, metrics, *keep), metrics)

    def _state(self) -> dict[str, Any]:
        return checkpoint.snapshot(
            {
                "model": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "quarantine": list(self.quarantine.entries.values()),
                "config": config.dump(self.cfg),
                "dataset": self.dataset.fingerprint,
                "labelled": self.labelled.fingerprint if self.labelled else None,
                "metrics": self.metrics,
                "precision": precision.name_of(self.dtype),
            }
        )

    def _resume(self, state: Mapping[str, Any]) -> None:
        checkpoint.require_same(state, self.cfg, self.dataset, self.labelled)
        self.method.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.metrics = dict(state["metrics"])
        self.quarantine.merge(state["quarantine"])
        if self.context.rank == 0:
            checkpoint.warn_of_unknown(self.cfg.checkpoint.keep_best, self.metrics)
            log.info("resuming at step %d of %d", self.step, self.plan.total_steps)

    def _write_ledger(self, ids: torch.Tensor) -> None:
        """ids: int64 [accumulate, N] of this rank. Every rank calls it."""
        all_ids = collectives.gather_no_grad(ids.T.contiguous()).T  # [accumulate, B]
        if self.monitor:
            self.monitor.ledger(self.step, self.plan.epoch(self.step - 1), all_ids.flatten().tolist())
