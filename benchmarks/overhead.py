"""What distssl adds to a training step: the loop over a bare step, Ray over torchrun, the wait for data in the demo.

Command: python benchmarks/overhead.py            (--part loop|ray, --repeats N; --demo-run DIR for a finished demo)

loop: the product's Training on packed images so small that data is not the limit, against forward, backward and
optimiser step of the same method on tensors in memory, one block of steps each in turn. A core is left to the loader.
ray: the demo's config under Ray and under torchrun in turn, a thread a worker; steps are timed where all are under way.
With as many workers as cores (the default) whatever Ray's own processes take comes off the steps; --workers 1 leaves a
core to them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import provenance
import torch

from distssl import config, method, monitor, train
from distssl.config import Run
from distssl.context import Context
from distssl.data import shards
from distssl.data.locations import Place
from distssl.data.shards import Dataset
from distssl.nn import norm, optim, precision

LOG_EVERY = 10  # the product's default: a window of steps between two stamps
WARM_WINDOWS = 1  # left out at the start of each block
LOOP = {
    "data.source": "scattered_digits",
    "data.global_batch": 128,
    "method.temperature": 0.2,
    "method.projector": [512, 128],
    "method.augment.size_px": 32,
    "method.augment.crop_area": [0.4, 1.0],
    "method.augment.jitter": 0.0,
    "method.augment.grey": 0.0,
    "method.augment.blur": 0.0,
    "model.backbone": "resnet10",
    "model.stem": "3x3_s2",
    "train.optimizer": "adamw",
    "train.lr": 0.001,
    "train.warmup_epochs": 0,
    "train.log_every": LOG_EVERY,
    "machine.workers": 0,
}
COMMANDS = {
    "ray": ("launch.py", "pretrain", "--workers={workers}"),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node={workers}", "launch.py"),
}


class StampingContext(Context):
    """Notes when the run logs (from line to line everything is in, the logging as well) and stops it after `steps`."""

    def __init__(self, run_dir: Path, steps: int) -> None:
        super().__init__(run_dir)
        self.steps = steps
        self.stamps: list[float] = []
        self.data_waits: list[float] = []  # seconds a step

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        batch = LOOP["data.global_batch"]
        self.stamps.append(time.perf_counter())
        self.data_waits.append(metrics["data_wait"] * batch / metrics["images_per_s"])

    def stop_requested(self) -> bool:
        return (len(self.stamps) + 1) * LOG_EVERY >= self.steps  # asked in the middle of the line being logged


@dataclass(frozen=True)
class Block:
    """Seconds a step of one repeat."""

    loop: float
    data_wait: float
    bare: float

    @property
    def overhead(self) -> float:
        """Of the loop without its wait for data, as a share of the bare step."""
        return (self.loop - self.data_wait) / self.bare - 1


def measure_loop(scratch: Path, repeats: int, steps: int, threads: int) -> list[Block]:
    """Blocks of `steps` steps of the loop and of the bare step, in turn and in alternating order."""
    torch.set_num_threads(threads)
    packed = shards.prepare(str(LOOP["data.source"]), scratch / "cache")
    dataset = Dataset.open(packed)
    blocks = []
    for repeat in range(repeats):
        run = _loop_run(scratch, packed, repeat)
        if repeat % 2:
            bare_s = _bare(run, steps)
            loop_s, data_wait_s = _loop(run, dataset, steps)
        else:
            loop_s, data_wait_s = _loop(run, dataset, steps)
            bare_s = _bare(run, steps)
        blocks.append(Block(loop_s, data_wait_s, bare_s))
        print(f"loop {repeat + 1}/{repeats}: overhead {blocks[-1].overhead:+.1%}", flush=True)
    return blocks


def _loop_run(scratch: Path, packed: Place, repeat: int) -> Run:
    """A run too long to end by itself, and no checkpoint but the one at its stop, after the last stamp."""
    places = {"data.source": packed, "machine.storage": scratch / "loop", "machine.cache": scratch / "cache"}
    more = {"name": f"repeat{repeat}", "train.epochs": 1000, "eval.every": "null", "checkpoint.every": 10**6}
    return config.load(None, [f"{key}={value}" for key, value in {**LOOP, **places, **more}.items()], method.options)


def _loop(run: Run, dataset: Dataset, steps: int) -> tuple[float, float]:
    """Seconds a step of the product's Training, and those of them spent waiting for data."""
    context = StampingContext(run.run_dir, steps)
    with context:
        train.Training(run, context, dataset).run()
    stamps = context.stamps[WARM_WINDOWS - 1 :]
    step_s = (stamps[-1] - stamps[0]) / (len(stamps) - 1) / LOG_EVERY
    return step_s, float(np.mean(context.data_waits[WARM_WINDOWS:]))


def _bare(run: Run, steps: int) -> float:
    """Seconds a step of forward, backward and optimiser on tensors in memory: same net, batch, precision."""
    precision.speed_up_float32_matmul()
    dtype = precision.resolve(run.train.precision, "cpu")
    net = method.build(run)
    norm.convert(net)
    net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = optim.build(net, name="adamw", lr=run.train.lr, weight_decay=run.train.weight_decay)
    shape = (run.data.global_batch, 3, 32, 32)
    views = {name: torch.randn(shape).contiguous(memory_format=torch.channels_last) for name in ("a", "b")}
    net.train()
    started = 0.0
    for step in range(steps):
        if step == WARM_WINDOWS * LOG_EVERY:
            started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = net(views)["loss"]
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - started) / (steps - WARM_WINDOWS * LOG_EVERY)


@dataclass(frozen=True)
class Timing:
    """One run from its metrics.jsonl and its TensorBoard stamps, without its start."""

    step_s: float  # as the run reports it
    stamped_s: float  # from line to line, the time it takes to log included
    data_wait: float  # share of the step


def measure_ray(scratch: Path, repeats: int, epochs: int, workers: int) -> dict[str, list[Timing]]:
    """The demo under Ray and under torchrun, in turn and in alternating order."""
    timings: dict[str, list[Timing]] = {"ray": [], "torchrun": []}
    commands = {name: [word.format(workers=workers) for word in words] for name, words in COMMANDS.items()}
    for repeat in range(repeats):
        for launcher in ("ray", "torchrun") if repeat % 2 == 0 else ("torchrun", "ray"):
            run_dir = scratch / "ray" / f"{launcher}{repeat}"
            _launch(commands[launcher], run_dir, scratch, epochs)
            timings[launcher].append(read_timing(run_dir))
            print(f"{launcher} {repeat + 1}/{repeats}: {timings[launcher][-1]}", flush=True)
            shutil.rmtree(run_dir)
    return timings


def _launch(command: Sequence[str], run_dir: Path, scratch: Path, epochs: int) -> None:
    """Run the demo's config, without its probes, to the end. Leaves the program where it fails."""
    overrides = [
        f"name={run_dir.name}",
        f"machine.storage={run_dir.parent}",
        f"machine.cache={scratch / 'cache'}",
        f"train.epochs={epochs}",
        "eval.every=null",
        "eval.tasks=[]",
    ]
    done = subprocess.run(
        [sys.executable, *command, *overrides],
        cwd=provenance.ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join([*command, *overrides])}\nfailed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def read_timing(run_dir: Path) -> Timing:
    """Means over the steps after the first WARM_WINDOWS lines of the log."""
    rows = [row for row in monitor.read_jsonl(run_dir / monitor.METRICS) if "loss" in row]
    batch = config.parse((run_dir / "config.yaml").read_text(), run_dir).data.global_batch
    steps = np.diff([row["step"] for row in rows])[WARM_WINDOWS - 1 :]
    rows = rows[WARM_WINDOWS:]
    seconds = np.array([batch / row["images_per_s"] for row in rows])
    waits = np.array([row["data_wait"] for row in rows])
    return Timing(
        step_s=float(np.average(seconds, weights=steps)),
        stamped_s=_stamped(run_dir),
        data_wait=float(np.average(waits, weights=steps * seconds)),
    )


def _stamped(run_dir: Path) -> float:
    """Median over windows of wall-clock a step between two TensorBoard points; a pause to evaluate is no median."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars("loss")[WARM_WINDOWS - 1 :]
    windows = [(b.wall_time - a.wall_time) / (b.step - a.step) for a, b in itertools.pairwise(points)]
    return float(np.median(windows))


def loop_table(blocks: Sequence[Block]) -> list[str]:
    columns = {
        "loop": [block.loop for block in blocks],
        "of it waiting for data": [block.data_wait for block in blocks],
        "bare step": [block.bare for block in blocks],
    }
    lines = ["| seconds a step | n | mean ± 95 % | min | max |", "|---|---|---|---|---|"]
    lines += [_row(name, values, "{:.4f}") for name, values in columns.items()]
    lines.append(_row("overhead without the wait, %", [100 * block.overhead for block in blocks], "{:+.1f}"))
    lines.append(_row("overhead with the wait, %", [100 * (b.loop / b.bare - 1) for b in blocks], "{:+.1f}"))
    return lines


def ray_table(timings: dict[str, list[Timing]], workers: int) -> list[str]:
    lines = [f"| the demo's config, workers: {workers} | n | mean ± 95 % | min | max |", "|---|---|---|---|---|"]
    for launcher, runs in timings.items():
        lines.append(_row(f"{launcher}, s a step as reported", [run.step_s for run in runs], "{:.4f}"))
        lines.append(_row(f"{launcher}, s a step, logging included", [run.stamped_s for run in runs], "{:.4f}"))
    pairs = list(zip(timings["ray"], timings["torchrun"], strict=True))
    lines.append(_row("Ray over torchrun, reported, %", [100 * (a.step_s / b.step_s - 1) for a, b in pairs], "{:+.1f}"))
    stamped = [100 * (a.stamped_s / b.stamped_s - 1) for a, b in pairs]
    lines.append(_row("Ray over torchrun, logging included, %", stamped, "{:+.1f}"))
    lines.append(_row("wait for data under Ray, % of the step", [100 * a.data_wait for a, _ in pairs], "{:.2f}"))
    return lines


def _row(name: str, values: Sequence[float], form: str) -> str:
    mean = f"{form.format(np.mean(values))} ± {form.format(provenance.interval(values)).lstrip('+')}"
    return f"| {name} | {len(values)} | {mean} | {form.format(min(values))} | {form.format(max(values))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("loop", "ray", "all"), default="all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="of a block of the loop; a multiple of 10")
    parser.add_argument("--epochs", type=int, default=6, help="of a run under Ray or torchrun")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2, help="under Ray or torchrun")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="torch's, in the loop")
    parser.add_argument("--demo-run", type=Path, help="also the wait for data of this finished run")
    args = parser.parse_args()
    if args.steps % LOG_EVERY or args.steps <= WARM_WINDOWS * LOG_EVERY:
        parser.error(f"--steps {args.steps}: a multiple of {LOG_EVERY} of at least {(WARM_WINDOWS + 1) * LOG_EVERY}")
    lines = [provenance.describe(), ""]
    with tempfile.TemporaryDirectory(prefix="distssl-overhead-") as folder:
        scratch = Path(folder)
        if args.part in ("loop", "all"):
            lines += [*loop_table(measure_loop(scratch, args.repeats, args.steps, args.threads)), ""]
        if args.part in ("ray", "all"):
            lines += [*ray_table(measure_ray(scratch, args.repeats, args.epochs, args.workers), args.workers), ""]
    if args.demo_run:
        lines.append(f"{args.demo_run.name}: {json.dumps(read_timing(args.demo_run).__dict__)}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
