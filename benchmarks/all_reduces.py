"""All-reduces of gloo between hosts, timed: `timed` starts this file as a program, which forks a rank for each host.

A rank is forked after torch is imported, once for all, and then put into its host's network namespace.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FIRST_PORT = 29500


def timed(hosts: Sequence[Path], world_sizes: Sequence[int], plan: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """{"world_size", "num_bytes", "seconds": [...]} for each; the slowest rank's seconds of each of the repeats.

    hosts: namespaces, at least as many as ranks. plan: (bytes, repeats). One all-reduce before the first is not timed.
    """
    given = json.dumps([[str(host) for host in hosts], list(world_sizes), list(plan)])
    environ = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # hosts have no names to look up
    root = str(Path(__file__).parent.parent)
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, given]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def _rank(rank: int, world_size: int, port: int, host: Path, plan: Sequence[tuple[int, int]]) -> None:
    import shaped_links  # beside this program; a test that imports this file does not come here

    from distssl import collectives

    shaped_links.enter(host)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": shaped_links.address(0),
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": shaped_links.PORT,
    }
    torch.set_num_threads(1)
    collectives.init("gloo", timeout_s=120)
    for num_bytes, repeats in plan:
        seconds = _seconds(torch.ones(num_bytes // 4), repeats)
        if rank == 0:
            print(json.dumps({"world_size": world_size, "num_bytes": num_bytes, "seconds": seconds}), flush=True)
    collectives.shutdown()


def _seconds(x: torch.Tensor, repeats: int) -> list[float]:
    from distssl import collectives

    seconds = []
    for _ in range(repeats + 1):
        collectives.barrier()
        started = time.perf_counter()
        collectives.sum_(x)
        seconds.append(time.perf_counter() - started)
    of_ranks = collectives.gather_objects(seconds[1:])
    return [max(same) for same in zip(*of_ranks, strict=True)]


def main(hosts: Sequence[str], world_sizes: Sequence[int], plan: Sequence[tuple[int, int]]) -> None:
    for nth, world_size in enumerate(world_sizes):
        children = []
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                _rank(rank, world_size, FIRST_PORT + nth, Path(hosts[rank]), plan)
                os._exit(0)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"a rank of {world_size} failed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("given", type=json.loads, help="[hosts, world_sizes, plan], as JSON")
    main(*parser.parse_args().given)
