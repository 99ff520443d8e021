"""The certificate on a cluster: the same steps, by workers that Ray Train puts on its hosts."""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distssl import verify as certificate
from distssl.on_ray import place, workers
from distssl.verify import Case, Record


def at(world_sizes: Sequence[int]) -> certificate.Elsewhere:
    """Workers of the cluster, for `certify`. Raises ConfigError where it has no room for as many."""
    room = place.start()
    room.require(max(world_sizes), f"--world-sizes {max(world_sizes)}")
    return functools.partial(_records, room.share)


def _records(share: dict[str, int], cases: Sequence[Case], world_size: int) -> list[Record]:
    work = functools.partial(_take_steps, list(cases), f"distssl-verify-{uuid.uuid4().hex[:8]}")
    return workers.run(work, world_size, share)


def _take_steps(cases: Sequence[Case], name: str, the_desk: Any) -> list[Record]:
    """On each worker; the steps of all of them."""
    del the_desk
    logging.getLogger("distssl").setLevel(logging.WARNING)
    folder = Path(tempfile.gettempdir()) / name  # each host has its own
    try:
        packed = certificate.pack(folder)
        return [certificate.record(case, packed, folder / "runs") for case in cases]
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # another worker of this host may have been first
