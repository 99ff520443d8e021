"""Downloads with patience: what was cut goes on where it was."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from distssl import atomic, stores
from distssl.data import locations
from distssl.data.locations import Object
from distssl.errors import RunError
from distssl.stores import StoppedError, Waits

RETRY_S = 120.0
WAITS = Waits(first_s=0.1, longest_s=8.0)
CHUNK = 8 << 20  # bytes a request; halved where answers are cut
SMALLEST_CHUNK = 64 << 10
NUM_DOWNLOADS = 3  # of a tar that comes whole and is not the one that was indexed

ADVICE = {  # where the server has said no, by its status
    401: "check the credentials",
    403: "check the credentials and that they may read it; some stores say 403 of what is not there",
    404: "check the URL, and that nobody has removed it",
    412: "it has changed since it was indexed: index it again",
}
OTHER_ADVICE = "check the URL and the credentials"

T = TypeVar("T")


class RefusedError(RunError):
    """The server has said no: trying again does not help."""


class TornError(RunError):
    """What a store holds is not what was indexed."""


@dataclass(frozen=True)
class Tar:
    """A remote tar and what a copy must be: sha256 where it is known, else what has the tag."""

    url: str
    num_bytes: int
    sha256: str | None
    tag: str | None

    @property
    def name(self) -> str:
        """For files; the same for the same content, and another where the tar has changed."""
        identity = self.sha256 or f"{self.url} {self.tag}"
        return hashlib.sha256(f"{identity} {self.num_bytes}".encode()).hexdigest()[:32]


def patiently(url: str, call: Callable[[], T], retry_s: float = RETRY_S, stop: threading.Event | None = None) -> T:
    """What `call` returns, tried for `retry_s` seconds where a failure may pass.

    Raises RefusedError at once where the server says no, RunError when the time is up, StoppedError on `stop`.
    """
    try:
        return stores.patiently(call, retry_s, WAITS, url, stop=stop)
    except StoppedError:
        raise
    except stores.GaveUpError as error:
        raise RunError(
            f"{url}: {error}; no better in machine.retry_s={retry_s:g} seconds, "
            "the same command goes on once the store is back"
        ) from error
    except Exception as error:
        if stores.is_refused(error):
            advice = ADVICE.get(stores.status(error) or 0, OTHER_ADVICE)
            raise RefusedError(f"{url}: {stores.said(error)}; {advice}") from error
        raise


def read(url: str, retry_s: float = RETRY_S) -> bytes:
    """A small object. Raises RefusedError where it is not there or not ours to read."""
    return patiently(url, lambda: locations.read(url), retry_s)


def opened(url: str, retry_s: float, stop: threading.Event | None = None) -> Object:
    """Raises as `patiently`."""
    return patiently(url, lambda: Object(url), retry_s, stop)


def write(url: str, file: Path, retry_s: float = RETRY_S) -> None:
    """Puts a file at a URL. Raises RefusedError where that is not allowed."""
    try:
        patiently(url, lambda: locations.write(url, file), retry_s)
    except NotImplementedError as error:
        raise RefusedError(f"{url}: cannot be written") from error


def download(
    tar: Tar, descriptor: int, *, retry_s: float, stop: threading.Event | None = None, on_full: Callable[[], bool]
) -> int:
    """Brings a tar into an open file, going on after the bytes it holds; the number of bytes that came.

    on_full: makes room on a full disk; False where it cannot. Raises TornError where the tar is not the one described,
    OSError (ENOSPC) where the disk stays full, and as `patiently`.
    """
    came = 0
    for attempt in range(1, NUM_DOWNLOADS + 1):
        source = opened(tar.url, retry_s, stop)
        problem = _changed(tar, source)
        if problem is None:
            came += _fill(source, tar.num_bytes, descriptor, retry_s, stop, on_full)
            problem = _wrong(tar, descriptor)
        if problem is None:
            os.fsync(descriptor)
            return came
        os.ftruncate(descriptor, 0)
        if attempt < NUM_DOWNLOADS and (stop or threading.Event()).wait(WAITS.first_s * 2**attempt):
            raise StoppedError
    raise TornError(f"{tar.url}: {problem}, at {NUM_DOWNLOADS} downloads; upload it again or index it again")


def _changed(tar: Tar, found: Object) -> str | None:
    if found.size != tar.num_bytes:
        return f"{found.size} bytes where the index says {tar.num_bytes}"
    if tar.sha256 is None and tar.tag and found.tag != tar.tag:
        return f"has the tag {found.tag} where the index says {tar.tag}"
    return None


def _wrong(tar: Tar, descriptor: int) -> str | None:
    size = os.fstat(descriptor).st_size
    if size != tar.num_bytes:
        return f"{size} bytes came where the index says {tar.num_bytes}"
    if tar.sha256 is None:
        return None
    digest, at = hashlib.sha256(), 0
    while block := os.pread(descriptor, 1 << 20, at):
        digest.update(block)
        at += len(block)
    found = digest.hexdigest()
    return None if found == tar.sha256 else f"sha256 {found[:12]} where the index says {tar.sha256[:12]}"


def _fill(
    source: Object,
    num_bytes: int,
    descriptor: int,
    retry_s: float,
    stop: threading.Event | None,
    on_full: Callable[[], bool],
) -> int:
    """Reads what is missing, range after range. Bytes that came; the patience is for one range and starts anew."""
    at = start = min(os.fstat(descriptor).st_size, num_bytes)
    chunk = CHUNK

    def one_range() -> bytes:
        nonlocal chunk
        try:
            return source.read(at, min(at + chunk, num_bytes))
        except Exception:
            chunk = max(SMALLEST_CHUNK, chunk // 2)  # something on the way may not let long answers through
            raise

    while at < num_bytes:
        data = patiently(source.url, one_range, retry_s, stop)
        at = _written(descriptor, data, at, on_full)
        chunk = min(CHUNK, 2 * chunk)
        if stop is not None and stop.is_set() and at < num_bytes:
            raise StoppedError
    return at - start


def _written(descriptor: int, data: bytes, at: int, on_full: Callable[[], bool]) -> int:
    """Where the next byte goes."""
    rest = memoryview(data)
    while rest:
        try:
            done = os.pwrite(descriptor, rest, at)
        except OSError as error:
            if not atomic.is_full_disk(error) or not on_full():
                raise
            continue
        rest, at = rest[done:], at + done
    return at


def fetch(url: str, file: Path, retry_s: float = RETRY_S) -> None:
    """Downloads an object to a file that is whole or not there."""
    source = opened(url, retry_s)
    with atomic.replacing(file) as part:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _fill(source, source.size, descriptor, retry_s, None, lambda: False)
        finally:
            os.close(descriptor)
