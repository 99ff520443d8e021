"""Shards on an object store: the same views, one download a node, a bound that holds, faults in one line."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from distssl import monitor
from distssl.config import Machine
from distssl.context import Context
from distssl.data import remote, shards, store
from distssl.data.shards import Dataset
from distssl.errors import ConfigError, RunError
from distssl.train import Training
from tests import planted, reading, runs
from tests.data import test_loader
from tests.object_server import Asked, Fault, ObjectServer

NUM, NUM_TARS = 96, 12


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve tars of eight photos, indexed before they went onto the store."""
    folder, members = tmp_path_factory.mktemp("packed"), planted.mixed(NUM)
    for shard in range(NUM_TARS):
        planted.write_tar(folder / f"{shard:02d}.tar", members[8 * shard : 8 * shard + 8])
    shards.index(str(folder))
    return folder


@pytest.fixture
def server(packed: Path) -> Iterator[ObjectServer]:
    found = ObjectServer(packed)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def local(packed: Path) -> dict:
    return {batch: reading.read(Dataset.open(packed), 2, 0, 1, batch)["digest"] for batch in (4, 16)}


def names(packed: Path) -> list[str]:
    return sorted(path.name for path in packed.glob("*.tar"))


def downloads(server: ObjectServer) -> dict[str, float]:
    """How often each tar has left the server, in bytes of bodies over bytes."""
    return {name: server.sent[name] / (server.folder / name).stat().st_size for name in names(server.folder)}


def held(folder: Path) -> int:
    """Bytes of the cache at a moment: nothing comes or goes while its lock is held. A part is what it will be."""
    folder.mkdir(exist_ok=True)
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sizes = [(path.name.split("."), path.stat().st_size) for path in folder.glob("*.*") if path.name != ".lock"]
        return sum(max(size, int(name[1])) if name[-1] == "part" else size for name, size in sizes)


def opened(server: ObjectServer, tmp_path: Path, **options: float) -> Dataset:
    return Dataset.open(server.url, Machine(cache=tmp_path / "cache", **{"retry_s": 5, **options}))


def test_views_are_those_of_local_shards_bit_for_bit(server: ObjectServer, packed: Path, tmp_path: Path) -> None:
    there, here = opened(server, tmp_path), Dataset.open(packed)
    assert there.fingerprint == here.fingerprint
    for world_size in (1, 2):
        found, bad = test_loader.batches(there, world_size=world_size)
        expected, _ = test_loader.batches(here, world_size=world_size)
        assert not bad
        assert len(found) == len(expected) == 2 * NUM // 32
        assert all(test_loader.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert downloads(server) == dict.fromkeys(names(packed), 1.0)
    figures = there.take_figures()
    assert 0.5 < figures["cache_hit_rate"] <= 1
    assert here.take_figures() == {}


def test_one_download_of_a_tar_a_node_at_four_ranks_on_two_nodes(
    server: ObjectServer, packed: Path, tmp_path: Path
) -> None:
    server.latency_s = 0.005
    nodes = [tmp_path / "a", tmp_path / "a", tmp_path / "b", tmp_path / "b"]
    options = [("--rank", str(rank), "--world-size", "4", "--epochs", "2") for rank in range(4)]
    ranks = [reading.start(server.url, node, *of, sharing=2) for node, of in zip(nodes, options, strict=True)]
    found = [reading.finish(rank) for rank in ranks]
    here = Dataset.open(packed)
    assert [rank["digest"] for rank in found] == [reading.read(here, 2, rank, 4, 16)["digest"] for rank in range(4)]
    used = {name: 0 for name in names(packed)}
    for node in ("a", "b"):
        for name, tar in zip(names(packed), here.tars, strict=True):
            used[name] += (tmp_path / node / "tars" / f"{tar.name}.tar").exists()
    assert downloads(server) == used
    assert sum(used.values()) > NUM_TARS  # or the nodes had nothing in common


def test_three_processes_that_read_more_than_fits_never_exceed_the_bound(
    server: ObjectServer, packed: Path, local: dict, tmp_path: Path
) -> None:
    sizes = [path.stat().st_size for path in packed.glob("*.tar")]
    bound = int(sum(sizes) * 0.55)
    server.latency_s = 0.003
    options = ("--gb", str(bound / 1e9), "--batch", "4", "--epochs", "2")
    ranks = [reading.start(server.url, tmp_path, *options) for _ in range(3)]
    most = 0
    while any(rank.poll() is None for rank in ranks):
        most = max(most, held(tmp_path / "tars"))
        time.sleep(0.002)
    assert [reading.finish(rank)["digest"] for rank in ranks] == [local[4]] * 3
    assert sum(sizes) / 3 < most <= bound
    assert max(downloads(server).values()) > 1  # it did not fit


def test_tars_come_in_the_order_of_their_first_use(server: ObjectServer, tmp_path: Path) -> None:
    dataset = opened(server, tmp_path, download_threads=1)
    reader = store.open_shards(dataset)
    wanted = [7, 2, 11, 0, 5]
    requests = iter([reading.Request(np.arange(8 * shard, 8 * shard + 8)) for shard in wanted])
    coming = reader.ahead(requests)
    next(coming)
    deadline = time.monotonic() + 10
    while sum(server.sent[f"{shard:02d}.tar"] > 0 for shard in wanted) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    reader.close()
    first = list(dict.fromkeys(asked.name for asked in server.asked if asked.name.endswith(".tar")))
    assert first == [f"{shard:02d}.tar" for shard in wanted]


def test_a_killed_downloader_is_taken_over_from_where_it_was(
    server: ObjectServer, local: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, over = threading.Event(), threading.Event()

    def stall(asked: Asked) -> Fault | None:
        if asked.method == "GET" and asked.name.endswith(".tar") and asked.start >= 16384 and not over.is_set():
            half.set()
            return Fault(after_s=5.0)
        return None

    for path in server.folder.glob("*.tar"):
        assert path.stat().st_size > 16384
    server.misbehave = stall
    small = ("--chunk", "16384")
    killed = reading.start(server.url, tmp_path, *small)
    assert half.wait(20)
    time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    over.set()
    parts = {path.name.split(".")[0]: path.stat().st_size for path in (tmp_path / "tars").glob("*.part")}
    assert max(parts.values()) == 16384
    server.asked.clear()
    assert reading.finish(reading.start(server.url, tmp_path, "--epochs", "2", *small))["digest"] == local[16]
    starts = {asked.name: asked.start for asked in reversed(server.asked) if asked.method == "GET"}
    tars = dict(zip(names(server.folder), Dataset.open(server.folder).tars, strict=True))
    assert {starts[name] for name, tar in tars.items() if parts.get(tar.name)} == {16384}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault(status=404), r"05\.tar: 404 .*check the URL"),
        (Fault(status=403), r"05\.tar: 403 .*check the credentials"),
        (Fault(status=503), r"05\.tar: 503 .*no better in machine\.retry_s=0\.5 seconds"),
        (Fault(cut=100), r"05\.tar: .*not completed.*no better in machine\.retry_s=0\.5 seconds"),
    ],
)
def test_a_tar_that_does_not_come_ends_the_run_in_one_line(
    server: ObjectServer, tmp_path: Path, fault: Fault, says: str
) -> None:
    dataset = opened(server, tmp_path, retry_s=0.5)
    server.misbehave = lambda asked: fault if asked.name == "05.tar" else None
    with pytest.raises(RunError, match=says) as told:
        test_loader.batches(dataset)
    assert len(str(told.value).splitlines()) == 1


def test_a_torn_tar_is_named(server: ObjectServer, packed: Path, tmp_path: Path) -> None:
    dataset = opened(server, tmp_path)
    whole = (packed / "03.tar").read_bytes()
    try:
        (packed / "03.tar").write_bytes(whole[:-1] + b"x")
        with pytest.raises(RunError, match=r"03\.tar: sha256 .* where the index says"):
            test_loader.batches(dataset)
    finally:
        (packed / "03.tar").write_bytes(whole)


def test_a_server_that_breaks_off_for_a_while_changes_nothing(
    server: ObjectServer, packed: Path, local: dict, tmp_path: Path
) -> None:
    dataset = opened(server, tmp_path, retry_s=20)
    away = threading.Timer(0.1, lambda: (server.stop(), time.sleep(1), server.start()))
    away.start()
    server.latency_s = 0.05
    assert reading.read(dataset, 2, 0, 1, 16)["digest"] == local[16]
    away.join()


def test_a_disk_that_is_smaller_than_the_bound_is_lived_with(
    server: ObjectServer, packed: Path, local: dict, tmp_path: Path
) -> None:
    disk = tmp_path / "cache"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=280k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        assert sum(path.stat().st_size for path in packed.glob("*.tar")) > 280_000
        dataset = opened(server, tmp_path)
        assert reading.read(dataset, 2, 0, 1, 4)["digest"] == local[4]
        for path in (disk / "tars").glob("*.tar"):
            path.unlink()
        with open(disk / "other", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        with pytest.raises(ConfigError, match=r"machine\.cache=.*: the disk is full, .*machine\.cache_gb") as told:
            reading.read(dataset, 1, 0, 1, 4)
        assert len(str(told.value).splitlines()) == 1
    finally:
        time.sleep(0.2)  # threads that were downloading have looked up
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_run_from_a_store_is_the_run_from_local_tars(tmp_path: Path) -> None:
    packed = runs.packed(tmp_path)
    server = ObjectServer(packed)
    try:
        logs = []
        for source in (str(packed), server.url):
            options = [f"name=from-{source.partition(':')[0].strip('/').replace('/', '-')}", "train.epochs=2"]
            run = runs.tiny(packed, tmp_path, *options, f"data.source={source}")
            run.run_dir.mkdir(parents=True)
            with Context(run.run_dir) as context:
                Training(run, context, Dataset.open(source, run.machine)).run()
            logs.append(monitor.read_jsonl(run.run_dir / monitor.METRICS))
    finally:
        server.stop()
    here, there = logs
    assert [row["loss"] for row in there] == [row["loss"] for row in here]
    assert all(0 <= row["cache_hit_rate"] <= 1 for row in there if "data_wait" in row)
    assert not any("cache_hit_rate" in row for row in here)


def test_a_bound_below_what_is_needed_at_once_is_the_users_mistake(
    server: ObjectServer, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sorted(path.stat().st_size for path in packed.glob("*.tar"))
    with pytest.raises(ConfigError, match=r"machine\.cache_gb=1e-05: http.*\.tar alone takes [\d.]+ GB"):
        opened(server, tmp_path, cache_gb=1e-5)
    few = opened(server, tmp_path, cache_gb=3 * sizes[-1] / 1e9)
    with pytest.raises(
        ConfigError, match=r"machine\.cache_gb=.*tars of one batch take ([\d.]+) GB.*at least \1 is right"
    ):
        test_loader.batches(few)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    some = opened(server, tmp_path, cache_gb=sum(sizes) * 0.9 / 1e9)
    with pytest.raises(ConfigError, match="in each of 4 processes"):
        test_loader.batches(some)


def test_a_replacement_for_a_bad_sample_is_the_same_as_with_local_shards(
    server: ObjectServer, packed: Path, tmp_path: Path
) -> None:
    here = Dataset.open(packed)
    there = opened(server, tmp_path)
    bad = [3, 40, 77]
    found = []
    for dataset in (here, there):
        quarantine = test_loader.Quarantine()
        unknown = {"shard": "", "offset": 0, "key": "", "reason": ""}
        quarantine.merge([{"source": quarantine.source, "id": id_, **unknown} for id_ in bad])
        found.append(test_loader.batches(dataset, quarantine=quarantine)[0])
    assert not any(torch.isin(batch["id"], torch.tensor(bad)).any() for batch in found[1])
    assert all(test_loader.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_look_ahead_hands_on_every_request_in_its_order(server: ObjectServer, tmp_path: Path) -> None:
    reader = store.open_shards(opened(server, tmp_path))
    requests = [reading.Request(np.array([nth % NUM])) for nth in range(3 * remote.LOOK_AHEAD)]
    assert list(reader.ahead(iter(requests))) == requests
    assert list(reader.ahead(iter([]))) == []
    reader.close()
