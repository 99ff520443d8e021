"""Fixtures of the whole suite: `ranks(W)` is a pool of W gloo ranks that lives as long as the test module.

    def test_something(ranks):
        results = ranks(2).run(function_of_this_module, *picklable_args)   # one result per rank, in rank order

`function_of_this_module` runs in every rank, inside one process group, with one torch thread. An exception in a rank is
raised here with its traceback; a rank that does not answer in time fails the test, and its stack goes to stderr. After
either the pool is thrown away and the next test gets a new one. Ranks are forked from one process that has imported
what most of them need, so a pool costs little, and none is kept beside the tests that follow.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests.buckets import bucket, object_store, unreliable  # noqa: F401 - fixtures of the whole suite

ROOT = Path(__file__).parent.parent
CLUSTERS = "tests/cluster/"
ONPREM = f"{CLUSTERS}test_onprem.py"
LONG = (ONPREM, CLUSTERS, "tests/on_ray/test_pretrain.py", "tests/on_ray/test_sweep.py", "tests/on_ray/")

# Before torch is there. Tests' tensors are so small that a second thread only waits for the first: on a machine that
# does other work too, training tests took a hundred times as long with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # other tests' memory is no reason to end a Ray's workers


class RankError(AssertionError):
    """A function that ran in the ranks raised in one of them, or did not return in time."""


class Nursery:
    """The process that pools of ranks are forked from. It starts with the first, which takes the seconds of imports."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.orders: socket.socket

    def fork(self, fds: list[int]) -> int:
        """A pool of as many ranks, each at the other end of a pipe: the id of its process group."""
        if self.process is None:
            self.orders, theirs = socket.socketpair()
            environ = os.environ | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            }
            command = [sys.executable, str(ROOT / "tests/ranks.py"), str(theirs.fileno())]
            self.process = subprocess.Popen(command, env=environ, pass_fds=[theirs.fileno()], start_new_session=True)
            theirs.close()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        socket.send_fds(self.orders, [str(port).encode()], fds)
        return int(self.orders.recv(16))

    def close(self) -> None:
        if self.process is not None:
            self.orders.close()
            self.process.wait(timeout=30)


class Ranks:
    """W processes in one gloo group, from the first `run` on."""

    def __init__(self, world_size: int, nursery: Nursery) -> None:
        self.world_size, self.nursery = world_size, nursery
        self.group: int | None = None  # of the processes
        self.connections: list[connection.Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """`function(*args)` in every rank: the results in rank order. It must stand at the top of a test module."""
        if self.group is None:
            self._start()
        module = sys.modules[function.__module__]
        assert getattr(module, function.__qualname__, None) is function, f"{function.__qualname__} is not module-level"
        for rank in self.connections:
            rank.send_bytes(pickle.dumps((module.__name__, module.__file__, function.__qualname__, timeout_s)))
            rank.send_bytes(pickle.dumps(args))
        return self._collect(function.__qualname__, timeout_s)

    def close(self) -> None:
        if self.group is not None:
            with contextlib.suppress(ProcessLookupError):  # all have died
                os.killpg(self.group, signal.SIGKILL)  # only the ranks are in it
        for rank in self.connections:
            rank.close()
        self.group, self.connections = None, []

    def _start(self) -> None:
        pipes = [multiprocessing.Pipe() for _ in range(self.world_size)]
        self.connections = [ours for ours, _ in pipes]
        self.group = self.nursery.fork([theirs.fileno() for _, theirs in pipes])
        for _, theirs in pipes:
            theirs.close()  # so that the death of a rank is an end of file
        self._collect("joining the process group", timeout_s=120)

    def _collect(self, name: str, timeout_s: float) -> list[Any]:
        deadline = time.monotonic() + timeout_s + 1  # the ranks dump their stacks at timeout_s
        waiting = dict(zip(self.connections, range(self.world_size), strict=True))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while waiting:
            ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for answered in ready:
                assert isinstance(answered, connection.Connection)
                rank = waiting.pop(answered)
                try:
                    ok, value = pickle.loads(answered.recv_bytes())
                except EOFError:
                    ok, value = False, "the process died"
                (results if ok else failures)[rank] = value
            if failures:  # the others may wait for the one that failed: give them a moment to fail by themselves
                deadline = min(deadline, time.monotonic() + 2)
        if failures or waiting:
            self.close()
        if failures:
            raise RankError(
                "\n".join(f"rank {rank} of {self.world_size}: {failures[rank]}" for rank in sorted(failures))
            )
        if waiting:
            raise RankError(
                f"{name}: rank {sorted(waiting.values())} of {self.world_size} is silent after {timeout_s} s"
            )
        return [results[rank] for rank in range(self.world_size)]


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture(scope="module")
def ranks(nursery: Nursery) -> Iterator[Callable[[int], Ranks]]:
    pools: dict[int, Ranks] = {}
    yield lambda world_size: pools.setdefault(world_size, Ranks(world_size, nursery))
    for pool in pools.values():
        pool.close()


Said = tuple[int, str, list[str]]  # exit code, stdout, lines of stderr


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """`launch.py ARGUMENTS` in this process."""
    import launch  # not in every rank's process

    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        try:
            code = launch.main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = int(left.code or 0)
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what takes longest, so that no process is left with it at the end."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.dist)
    items.sort(key=lambda item: next((at for at, name in enumerate(LONG) if item.nodeid.startswith(name)), len(LONG)))


class ByFile(LoadFileScheduling):
    """What `pytest -n` gives to one process: a file, or all tests of clouds: their clusters have one name, by which Ray
    names its sockets below /tmp."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return CLUSTERS if file.startswith(CLUSTERS) and file != ONPREM else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    return ByFile(config, log)
