"""One rank that reads a dataset as training does, without decoding: a process of its own, on the node `--cache` says.

Says the sha256 of all bytes in their order and what the cache did, as JSON; exit code 1 and one line where it cannot.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distssl.config import Machine
from distssl.data import store, transfer
from distssl.data.dataset import Dataset
from distssl.data.order import Order
from distssl.errors import ConfigError, RunError

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Request:
    ids: np.ndarray


def requests(order: Order, epochs: int, rank: int, world_size: int) -> Iterator[Request]:
    for epoch in range(epochs):
        for step in range(order.steps_per_epoch):
            yield Request(order.rank_batch(epoch, step, rank=rank, world_size=world_size))


def read(dataset: Dataset, epochs: int, rank: int, world_size: int, batch: int, step_s: float = 0.0) -> dict:
    """What a rank reads; `step_s` is what a training step would take."""
    order = Order(dataset.shard_first, seed=0, global_batch=batch, lanes=min(batch, 8), shuffle_window=16)
    reader, digest, waited_s = store.open_shards(dataset), hashlib.sha256(), []
    dataset.rows(np.arange(1))  # pyarrow takes half a second to be used for the first time
    began = time.perf_counter()
    coming = reader.ahead(requests(order, epochs, rank, world_size))
    try:
        while True:
            started = time.perf_counter()
            request = next(coming, None)
            if request is None:
                break
            rows = dataset.rows(request.ids)
            for place in zip(rows.shard.tolist(), rows.offset.tolist(), rows.size.tolist(), strict=True):
                digest.update(reader.read(*place))
            reader.release()
            waited_s.append(time.perf_counter() - started)
            time.sleep(step_s)
    finally:
        reader.close()
    traffic = dataset.traffic
    counts = {name: getattr(traffic, name) for name in ("hits", "misses", "num_downloads")} if traffic else {}
    return {"digest": digest.hexdigest(), "waited_s": waited_s, "total_s": time.perf_counter() - began, **counts}


def start(url: str, cache: Path, *options: str, sharing: int = 1) -> subprocess.Popen[str]:
    """Such a process, one of `sharing` on its node."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"LOCAL_WORLD_SIZE": str(sharing), "PYTHONPATH": paths}
    command = [sys.executable, __file__, url, str(cache), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str], timeout_s: float = 60) -> dict:
    out, said = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, said
    return json.loads(out)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("cache", type=Path)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--retry-s", type=float, default=20)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=transfer.CHUNK, help="bytes a request")
    parser.add_argument("--step-s", type=float, default=0.0)
    args = parser.parse_args()
    transfer.CHUNK = args.chunk
    machine = Machine(cache=args.cache, cache_gb=args.gb, retry_s=args.retry_s)
    try:
        dataset = Dataset.open(args.url, machine)
        found = read(dataset, args.epochs, args.rank, args.world_size, args.batch, args.step_s)
    except (ConfigError, RunError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
