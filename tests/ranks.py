"""The ranks of the tests' gloo pools, forked from the process that conftest.py starts with this.

usage: ranks.py FD, a socket: each message on it is the port of a new pool's store, with the ends of the pipes to its
ranks; the answer is the pool's process group. Each rank joins the gloo group, then runs the functions it is sent. They
come as module name, file and function name, because a test module is imported by path (--import-mode=importlib) and has
no name that another process could import.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import pickle
import signal
import socket
import sys
import traceback
import warnings
from multiprocessing import connection
from types import ModuleType

import timm  # noqa: F401 - as the next two, so that no rank has to
import torch
import torchvision  # noqa: F401

from distssl import collectives, verify  # noqa: F401

MOST_RANKS = 64


def load(name: str, path: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def serve(parent: connection.Connection) -> None:
    while True:
        name, path, function, timeout_s = pickle.loads(parent.recv_bytes())
        args = parent.recv_bytes()
        try:
            call = getattr(load(name, path), function)
            faulthandler.dump_traceback_later(timeout_s)
            result = call(*pickle.loads(args))  # only now: the arguments may be of the module's classes
            faulthandler.cancel_dump_traceback_later()
            parent.send_bytes(pickle.dumps((True, result)))
        except Exception:  # noqa: BLE001 - it is raised again in pytest's process
            parent.send_bytes(pickle.dumps((False, traceback.format_exc())))


def run(rank: int, fd: int) -> None:
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as in the parent's pytest
    parent = connection.Connection(fd)
    collectives.init("gloo", timeout_s=120)
    parent.send_bytes(pickle.dumps((True, None)))
    try:
        serve(parent)
    except EOFError:  # pytest is gone
        os._exit(0)


def pool(port: int, fds: list[int]) -> None:
    os.setsid()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(fds))}
    for rank, fd in enumerate(fds):
        if os.fork() == 0:
            for other in set(fds) - {fd}:
                os.close(other)
            return run(rank, fd)


def main() -> None:
    orders = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a pool
    while True:
        port, fds, *_ = socket.recv_fds(orders, 16, MOST_RANKS)
        if not port:  # pytest is gone
            return
        child = os.fork()
        if child == 0:
            orders.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return pool(int(port), fds)
        for fd in fds:
            os.close(fd)
        orders.send(str(child).encode())


if __name__ == "__main__":
    main()
