"""The ranks of the tests' gloo pool, started by conftest.py: each joins the group, then runs the functions it is sent.

usage: ranks.py FD..., a rank's end of a pipe each, with torchrun's environment variables but RANK. torch is imported
once and the ranks are forked from that. Functions come as module name, file and function name, because a test module
is imported by path (--import-mode=importlib) and has no name that another process could import.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import pickle
import sys
import traceback
import warnings
from multiprocessing import connection
from types import ModuleType

import torch

from distssl import collectives


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


def main() -> None:
    fds = [int(fd) for fd in sys.argv[1:]]
    for rank, fd in enumerate(fds):
        if os.fork() == 0:
            for other in set(fds) - {fd}:
                os.close(other)
            return run(rank, fd)
    for fd in fds:
        os.close(fd)
    for _ in fds:
        os.wait()


if __name__ == "__main__":
    main()
