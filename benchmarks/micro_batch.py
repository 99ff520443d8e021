"""What micro-batches save and cost: peak memory and time of a step of the demo's SimCLR, on tensors in memory.

Command: python benchmarks/micro_batch.py            (--images 8192 --sizes 512,128,whole --steps 1)

Every row is a process of its own. A batch of B images is 2B embeddings, each with 2B - 2 negatives. Memory is the
process's largest resident set as the kernel counts it: Python, torch and the views are in it, and stand beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import provenance
import torch

from distssl import config, method
from distssl.data.order import default_lanes
from distssl.nn import optim, precision
from distssl.nn.micro_batches import MicroBatches

DEMO = provenance.ROOT / "configs" / "default.yaml"


@dataclass(frozen=True)
class Cost:
    """before_mb: with the network and the views, before the first step; peak_mb: after the last."""

    before_mb: float
    peak_mb: float
    step_s: float


def measure(num_images: int, size: int | None, steps: int, threads: int) -> Cost:
    """Steps of `num_images`, `size` at a time in the backbone; the whole of a process."""
    torch.set_num_threads(threads)
    precision.speed_up_float32_matmul()
    run = config.load(Path(DEMO), [], method.options)
    net = method.build(run).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if size is not None:
        net.take_parts(MicroBatches(num_images // default_lanes(num_images), num_images // size))
    optimizer = optim.build(net, name="adamw", lr=run.train.lr, weight_decay=run.train.weight_decay)
    shape = (num_images, 3, 32, 32)
    views = {name: torch.randn(shape).contiguous(memory_format=torch.channels_last) for name in ("a", "b")}
    before_mb = _peak_mb()
    started = time.perf_counter()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        net(views)["loss"].backward()
        optimizer.step()
    return Cost(before_mb, _peak_mb(), (time.perf_counter() - started) / steps)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8192, help="of the batch")
    parser.add_argument("--sizes", default="512,128,whole", help="micro-batches, images")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    lines = [
        provenance.describe(),
        "",
        f"{args.images} images, {2 * args.images} embeddings, {args.threads} threads",
        "",
    ]
    lines += ["| images at a time | before, MB | peak, MB | s a step |", "|---" * 4 + "|"]
    for size in args.sizes.split(","):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            number = None if size == "whole" else int(size)
            cost = process.apply(measure, (args.images, number, args.steps, args.threads))
        lines.append(f"| {size} | {cost.before_mb:.0f} | {cost.peak_mb:.0f} | {cost.step_s:.1f} |")
        print(lines[-1], flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
