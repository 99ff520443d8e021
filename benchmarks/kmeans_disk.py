"""k-means of more rows than memory is to hold, in a process of its own whose peak is read: kmeans.py --part disk."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import stopwatch
import torch
import torch.nn.functional as F

from distssl.nn import kmeans, precision


def table(num_rows: int = 5_000_000, dim: int = 64, k: int = 1000) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="distssl-kmeans-") as folder:
        path = Path(folder) / "rows.npy"
        file = np.lib.format.open_memmap(path, "w+", np.float32, (num_rows, dim))
        for first in range(0, num_rows, 100_000):  # about the same 2k directions
            generator = torch.Generator().manual_seed(0)
            directions = torch.randn(2 * k, dim, generator=generator)
            generator.manual_seed(first + 1)
            rows = min(100_000, num_rows - first)
            x = 0.7 * torch.randn(rows, dim, generator=generator)
            x += directions[torch.randint(2 * k, (rows,), generator=generator)]
            file[first : first + rows] = F.normalize(x, dim=1).numpy()
        file.flush()
        del file
        command = [sys.executable, __file__, str(path), str(k)]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"disk failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [
        f"| {num_rows:,} x {dim} float32 ({num_rows * dim * 4 / 1e9:.2f} GB), k = {k:,} | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in found.items()),
    ]


def from_disk(path: Path, k: int) -> dict[str, Any]:
    """In a process of its own: its peak memory, and how it went."""
    precision.speed_up_float32_matmul()
    torch.set_num_threads(1)
    before = _status_mb("VmHWM")
    seen: list[float] = []
    with stopwatch.Clock() as clock:
        found = kmeans.fit(
            np.load(path, mmap_mode="r"), k, iterations=3, progress=lambda i, n, value: seen.append(value)
        )
    return {
        "peak of resident memory, MB": _status_mb("VmHWM"),
        "of it before, with torch imported, MB": before,
        "CPU seconds, start by k-means++ and 3 iterations": round(clock.cpu_s, 1),
        "seconds": round(clock.wall_s, 1),
        "objective a row by iteration": ", ".join(f"{value / len(found.labels):.4f}" for value in seen),
        "rows in clusters": int(found.sizes.sum()),
        "smallest and largest cluster": f"{int(found.sizes.min())}, {int(found.sizes.max())}",
    }


def _status_mb(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 // 10**6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="a .npy file of rows")
    parser.add_argument("k", type=int, help="clusters")
    print(json.dumps(from_disk(**vars(parser.parse_args()))))
