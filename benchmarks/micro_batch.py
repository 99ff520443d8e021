"""What micro-batches save and cost: peak memory and speed of the whole program, SimCLR on the demo's digits.

Command: python benchmarks/micro_batch.py            (--batches 2048,8192 --sizes whole,256 --steps 2)

Every row is `launch.py pretrain` in a process of its own, loader, network, optimiser and all. A batch of B images is 2B
embeddings, each with 2B - 2 negatives. Memory is the process's largest resident set, as the kernel counts it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import provenance

from distssl import monitor

DEMO = {
    "train.warmup_epochs": 0,
    "train.log_every": 1,
    "eval.every": "null",
    "eval.tasks": "[]",
    "machine.workers": 0,
    "machine.prefetch": 1,
}


def measure(scratch: Path, batch: int, micro_batch: int | None, steps: int) -> tuple[float, float]:
    """Peak memory in MB, and images a second of the last step."""
    name = f"batch{batch}_micro{micro_batch}"
    settings = {"name": name, "machine.storage": scratch, "machine.cache": scratch / "cache", "train.epochs": steps}
    settings |= {"data.global_batch": batch, "train.micro_batch": micro_batch or "null", **DEMO}
    command = [sys.executable, "launch.py", "pretrain", *(f"{key}={value}" for key, value in settings.items())]
    log = scratch / f"{name}.log"
    with open(log, "w") as file:
        child = subprocess.Popen(command, cwd=provenance.ROOT, stdout=file, stderr=file)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)}\nfailed:\n{log.read_text()[-4000:]}")
    rows = [row for row in monitor.read_jsonl(scratch / name / monitor.METRICS) if "loss" in row]
    return usage.ru_maxrss / 1024, rows[-1]["images_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="2048,8192", help="global batches, images")
    parser.add_argument("--sizes", default="whole,512,128", help="micro-batches, images")
    parser.add_argument("--steps", type=int, default=2, help="epochs; with 8,192 of the 11,176 digits a step each")
    args = parser.parse_args()
    lines = [
        "| images a batch | embeddings | in the backbone at a time | peak memory, MB | images/s |",
        "|---" * 5 + "|",
    ]
    with tempfile.TemporaryDirectory(prefix="distssl-micro-batch-") as folder:
        for batch in map(int, args.batches.split(",")):
            for size in args.sizes.split(","):
                peak_mb, rate = measure(Path(folder), batch, None if size == "whole" else int(size), args.steps)
                lines.append(f"| {batch} | {2 * batch} | {size} | {peak_mb:.0f} | {rate:.0f} |")
                print(lines[-1], flush=True)
    print("\n".join([provenance.describe(), "", *lines]))


if __name__ == "__main__":
    main()
