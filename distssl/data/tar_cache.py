"""Whole tars in a folder that all processes of a node share, never more bytes than its bound.

    NAME.tar         a tar that is whole and verified; its modification time is that of its last use
    NAME.BYTES.part  one on its way: it counts as BYTES from its first byte on

A process that reads a tar holds a shared flock on it, one that downloads holds an exclusive one on the part; both go
with the process, however it ends. Only what nobody has locked is evicted, the least recently used first: a file that is
removed while somebody reads it would still take its bytes. Claims and evictions take turns (`.lock`), reading does not.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from distssl import atomic
from distssl.data.transfer import Tar


class Denied(enum.Enum):
    """Why a tar is not this process's to download."""

    THERE = "it is in the cache"
    BUSY = "another process downloads it"
    FULL = "what is in the cache is in use"


class Entry(NamedTuple):
    """A file of the cache. num_bytes: what it takes or will take."""

    used_ns: int
    path: Path
    num_bytes: int


class TarCache:
    """num_bytes: the bound. Every process of the node opens its own; bounds may differ, and each holds to its own."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self.folder = folder
        self.num_bytes = num_bytes
        atomic.make_folder(folder)
        with self._turn():
            self._make_room(())  # a bound may be smaller than that of yesterday

    def pin(self, tar: Tar) -> int | None:
        """A file descriptor that keeps the tar from being evicted until it is closed; None where it is not there."""
        path = self._path(tar)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        # Between the two calls it may have been evicted, or is about to be.
        if not _locked(descriptor, fcntl.LOCK_SH) or not os.fstat(descriptor).st_nlink:
            os.close(descriptor)
            return None
        os.utime(descriptor)
        return descriptor

    def touch(self, tar: Tar) -> bool:
        """Count the tar as used now; whether it is there."""
        try:
            os.utime(self._path(tar))
        except FileNotFoundError:
            return False
        return True

    def claim(self, tar: Tar, keep: Collection[str] = ()) -> int | Denied:
        """A file descriptor of the part, this process's alone, with room for all of the tar; else why not.

        The part may hold bytes already, of a process that died. keep: names that are not to be evicted for it.
        """
        part = self._part(tar)
        with self._turn():
            if self._path(tar).exists():
                return Denied.THERE
            was_there = part.exists()
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
            if not _locked(descriptor, fcntl.LOCK_EX):
                os.close(descriptor)
                return Denied.BUSY
            os.utime(descriptor)
            if not self._make_room(keep):
                if not was_there:
                    part.unlink()
                os.close(descriptor)
                return Denied.FULL
        return descriptor

    def finish(self, tar: Tar, descriptor: int) -> None:
        """The part is whole: it becomes the tar, and `descriptor`, of `claim`, pins it."""
        with self._turn():
            self._part(tar).replace(self._path(tar))
            os.utime(descriptor)
            _locked(descriptor, fcntl.LOCK_SH)

    def give_up(self, tar: Tar, descriptor: int, *, keep: bool) -> None:
        """The part is not whole, and stays for whoever goes on with it if `keep`."""
        with self._turn():
            if not keep:
                self._part(tar).unlink()
            os.close(descriptor)

    def evict_one(self, keep: Collection[str] = ()) -> bool:
        """Remove what was used least recently and is not in use; False where there is nothing."""
        with self._turn():
            return self._evict(1, keep)

    def _make_room(self, keep: Collection[str]) -> bool:
        """Evict until the bound holds, counting parts as what they will be; nothing where that cannot be."""
        excess = sum(entry.num_bytes for entry in self._entries()) - self.num_bytes
        return excess <= 0 or self._evict(excess, keep)

    def _evict(self, num_bytes: int, keep: Collection[str]) -> bool:
        """Remove at least so many bytes, the least recently used first, or nothing and False."""
        locks, freed = [], 0
        try:
            going: list[Path] = []
            for entry in sorted(self._entries()):
                if freed >= num_bytes:
                    break
                if entry.path.name.partition(".")[0] not in keep:
                    locks.append(os.open(entry.path, os.O_RDONLY))
                    if _locked(locks[-1], fcntl.LOCK_EX):
                        going.append(entry.path)
                        freed += entry.num_bytes
            if freed < num_bytes:
                return False
            for path in going:
                path.unlink()
            return True
        finally:
            for lock in locks:
                os.close(lock)

    def _entries(self) -> list[Entry]:
        found = []
        with os.scandir(self.folder) as files:
            for file in files:
                _, _, rest = file.name.partition(".")
                if rest == "tar" or rest.endswith(".part"):
                    stat = file.stat()
                    size = stat.st_size if rest == "tar" else int(rest.partition(".")[0])
                    found.append(Entry(stat.st_mtime_ns, Path(file.path), size))
        return found

    def _path(self, tar: Tar) -> Path:
        return self.folder / f"{tar.name}.tar"

    def _part(self, tar: Tar) -> Path:
        return self.folder / f"{tar.name}.{tar.num_bytes}.part"

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        lock = os.open(self.folder / ".lock", os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _locked(descriptor: int, kind: int) -> bool:
    """Take or change the lock without waiting; False where another process's is in the way."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
