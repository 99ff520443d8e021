"""Processes of this machine by their place in the tree, from /proc. A process is its pid and the time it started."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A pid alone may be given to another process later."""

    pid: int
    started: str

    def is_alive(self) -> bool:
        found = _stat(self.pid)
        return found is not None and found[2] == self.started and found[0] != "Z"

    def kill(self) -> None:
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)

    def command_line(self) -> str:
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""


def below(pid: int) -> set[Process]:
    """The processes that live now and were started by `pid`, by those it started, and so on."""
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := _stat(int(entry.name))) is not None:
            children.setdefault(int(found[1]), []).append(Process(int(entry.name), found[2]))
    reached: set[Process] = set()
    ahead = list(children.get(pid, []))
    while ahead:
        process = ahead.pop()
        reached.add(process)
        ahead += children.get(process.pid, [])
    return reached


def ray_workers(driver: int) -> list[Process]:
    """Ray's processes below the driver that train."""
    return [found for found in below(driver) if "RayTrainWorker" in found.command_line()]


def _stat(pid: int) -> tuple[str, str, str] | None:
    """(state, parent's pid, start time in clock ticks); None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # what stands before is a name and may hold anything
    return fields[0], fields[1], fields[19]
