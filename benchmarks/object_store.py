"""Training from an object store with 20 ms latency a request: what it waits, how often a tar is downloaded, the bound.

Command: python benchmarks/object_store.py            (--repeats N, --latency-s S)

The photos of clothing_cc0_s224.zip lie in tars of 64 behind tests/object_server.py, in a process of its own that counts
what it sends. train: the product's Training (SimCLR, 64 px, a ResNet-10 of width 16), on local tars and from the store
with an empty cache, in turn; the share of the time it waits for views, which includes what this machine's cores take to
make them, so the two are to be compared. ranks: four ranks of two nodes, each node a cache folder, that read as
training does without decoding, 0.2 s a step. bound: three processes share a cache that holds half of the tars.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import photos
import provenance

from distssl import config, method, monitor
from distssl.context import Context
from distssl.data import shards
from distssl.data.shards import Dataset
from distssl.train import Training

ROOT = Path(__file__).resolve().parent.parent
SAMPLES_PER_SHARD = 64
RUN = [
    "data.global_batch=64",
    "data.shuffle_window=64",
    "method.augment={size_px: 64}",
    "model.backbone=resnet10",
    "model.stem=3x3_s2",
    "model.options={width: 16}",
    "train.optimizer=adamw",
    "train.lr=0.001",
    "train.epochs=1",
    "train.warmup_epochs=0",
    "train.log_every=5",
    "train.precision=float32",
    "eval.every=null",
    "machine.workers=0",
    "checkpoint.every=100000",
]
LEFT_OUT = 1  # windows of log_every steps at the start: DALI's pipeline is built
BAR = 0.05


@contextmanager
def served(folder: Path, latency_s: float) -> Iterator[str]:
    command = [sys.executable, str(ROOT / "tests" / "object_server.py"), str(folder), "--latency-s", str(latency_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def sent(url: str) -> dict[str, int]:
    """Bytes that have left the server, by name."""
    with urllib.request.urlopen(f"{url}/.counts") as answer:
        return json.load(answer)["sent"]


def times_downloaded(url: str, folder: Path) -> list[float]:
    counts = sent(url)
    return [counts.get(path.name, 0) / path.stat().st_size for path in sorted(folder.glob("*.tar"))]


def trained(source: str, scratch: Path) -> dict[str, list[float]]:
    """The log of a run in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", source, str(scratch)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    rows = monitor.read_jsonl(scratch / "runs" / "run" / monitor.METRICS)
    return {
        name: [row[name] for row in rows if name in row] for name in ("data_wait", "images_per_s", "cache_hit_rate")
    }


def train(source: str, scratch: Path) -> None:
    places = [f"data.source={source}", "name=run", f"machine.storage={scratch}/runs", f"machine.cache={scratch}/cache"]
    run = config.load(None, [*places, *RUN], method.options)
    run_dir = scratch / "runs" / "run"
    run_dir.mkdir(parents=True)
    with Context(run_dir) as context:
        Training(run, context, Dataset.open(source, run.machine)).run()


def reader(url: str, cache: Path, sharing: int, *options: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(sharing)}
    command = [sys.executable, str(ROOT / "tests" / "reading.py"), url, str(cache), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)


def finished(process: subprocess.Popen[str]) -> dict:
    out, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(out)


def ranks(url: str, scratch: Path) -> list[dict]:
    """Four ranks of two nodes."""
    options = ("--world-size", "4", "--epochs", "3", "--batch", "256", "--step-s", "0.2")
    nodes = [scratch / "node0", scratch / "node0", scratch / "node1", scratch / "node1"]
    started = [reader(url, node, 2, "--rank", str(rank), *options) for rank, node in enumerate(nodes)]
    return [finished(process) for process in started]


def most_held(url: str, cache: Path, bound: int) -> int:
    """The most bytes that a cache of three processes held, looked at every few milliseconds; parts count in full."""
    started = [reader(url, cache, 3, "--gb", str(bound / 1e9), "--epochs", "2", "--batch", "32") for _ in range(3)]
    most, folder = 0, cache / "tars"
    folder.mkdir(parents=True)
    while any(process.poll() is None for process in started):
        with open(folder / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = [(path.name.split("."), path.stat().st_size) for path in folder.glob("*.*") if path.name != ".lock"]
        most = max(most, sum(int(name[1]) if name[-1] == "part" else size for name, size in files))
        time.sleep(0.005)
    for process in started:
        finished(process)
    return most


def shown(values: list[float], digits: int = 3) -> str:
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latency-s", type=float, default=0.02)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        train(args.child[0], Path(args.child[1]))
        return
    with tempfile.TemporaryDirectory(prefix="distssl-store-") as name:
        report(Path(name), args.repeats, args.latency_s)


def report(scratch: Path, repeats: int, latency_s: float) -> None:
    packed = shards.pack(
        str(photos.find_data() / photos.CLOTHING), scratch / "packed", samples_per_shard=SAMPLES_PER_SHARD
    )
    sizes = [path.stat().st_size for path in packed.glob("*.tar")]
    print(provenance.describe())
    print(f"- {len(sizes)} tars, {sum(sizes) / 1e6:.0f} MB; {latency_s * 1000:g} ms a request; n: {repeats} repeats\n")
    print("| | found, mean [min, max] | bar |\n|---|---|---|")
    waits: dict[str, list[float]] = {"local": [], "store": []}
    rates: dict[str, list[float]] = {"local": [], "store": []}
    downloads: list[float] = []
    hits: list[float] = []
    for repeat in range(repeats):
        with served(packed, latency_s) as url:
            for place, source in (("local", str(packed)), ("store", url)):
                log = trained(source, scratch / f"{place}{repeat}")
                waits[place].append(statistics.mean(log["data_wait"][LEFT_OUT:]))
                rates[place].append(statistics.mean(log["images_per_s"][LEFT_OUT:]))
                hits += log["cache_hit_rate"][LEFT_OUT:]
            downloads += times_downloaded(url, packed)
    print(f"| training, local tars: share of time waiting | {shown(waits['local'])} | |")
    print(f"| training, store: share of time waiting | {shown(waits['store'])} | < {BAR} |")
    print(f"| training, local tars: images/s | {shown(rates['local'], 1)} | |")
    print(f"| training, store: images/s | {shown(rates['store'], 1)} | |")
    print(f"| training, store: cache hit rate | {shown(hits)} | |")
    print(f"| training, store: downloads of a tar | {shown(downloads)} | 1 |")
    waits_of_ranks, afterwards, downloads = [], [], []
    for repeat in range(repeats):
        with served(packed, latency_s) as url:
            for rank in ranks(url, scratch / f"ranks{repeat}"):
                first, total = rank["waited_s"][0], sum(rank["waited_s"])
                waits_of_ranks.append(total / rank["total_s"])
                afterwards.append((total - first) / (rank["total_s"] - first))
            downloads += times_downloaded(url, packed)
    print(f"| 4 ranks on 2 nodes: share of time waiting | {shown(waits_of_ranks)} | |")
    print(f"| 4 ranks on 2 nodes: the same after the first batch | {shown(afterwards)} | < {BAR} |")
    print(f"| 4 ranks on 2 nodes: downloads of a tar, both nodes | {shown(downloads)} | <= 2 |")
    bound = sum(sizes) // 2
    with served(packed, latency_s) as url:
        most = [most_held(url, scratch / f"bound{repeat}", bound) / bound for repeat in range(repeats)]
    print(f"| 3 processes, cache of half the tars: most held, of its bound | {shown(most)} | <= 1 |")


if __name__ == "__main__":
    main()
