"""Files that are whole or not there (a temporary name, fsync, rename), locks, and a full disk said in one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from distssl.errors import ConfigError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved to `path` when the block ends well and removed when it does not.

    The temporary name is fixed and hidden, so what a killed process left is written over by the next one: hold
    `locked` on the folder. Raises ConfigError when the disk is full.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with full_disk_named(path):
            yield part
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        written = path.with_name(f".{path.name}.part")
        size = written.stat().st_size if written.is_file() else 0
        free = shutil.disk_usage(path.parent).free
        raise ConfigError(
            f"{path}: the disk is full: {size:,} bytes written and more needed, {free:,} free; "
            "free some space and run the same command again, it goes on"
        ) from error


def is_full_disk(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def require_free(folder: Path, needed: int) -> None:
    """Raises ConfigError when `folder`'s disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"{folder}: not enough disk space: {needed:,} bytes needed, {free:,} free; "
            "free some space or choose another place"
        )


def make_folder(folder: Path) -> None:
    """Creates a folder to write into. Raises ConfigError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror}; choose a folder that can be written") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time writes into `folder`; the lock goes with the process, however it ends."""
    try:
        lock = os.open(folder / ".lock", os.O_WRONLY | os.O_CREAT)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written: {error.strerror}; choose a folder that can be written"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is writing into %s: waiting for it", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def held(lock: Path, patience_s: float, taken: str) -> Iterator[None]:
    """Hold a lock file, made where it is not there; it goes with the process, however it ends.

    Raises ConfigError with the message `taken` where another process has it for longer than `patience_s`.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        deadline = time.monotonic() + patience_s
        if patience_s and not _flocked(descriptor):
            log.info("another process has %s: waiting %.0f s for its end", lock, patience_s)
        while not _flocked(descriptor):
            if time.monotonic() >= deadline:
                raise ConfigError(taken)
            time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def _flocked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
