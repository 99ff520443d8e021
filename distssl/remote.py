"""Files at a URL: s3:// or another kind that fsspec reads. Where it does not answer, it is asked again for minutes."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from distssl.errors import ConfigError, RunError

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = 300.0  # with a store that does not answer
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0  # between tries
PROBE = ".probe"
# There folders come with their files, and to ask s3fs for a folder may make a bucket.
WITHOUT_FOLDERS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory")
# What s3fs makes of a bad request, a method not allowed or not known, another region; a torn request is one of them.
REFUSALS = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EREMCHG)


def is_url(place: str) -> bool:
    return "://" in place


def checked(url: str) -> str:
    """A URL without the slashes at its end. Raises ValueError where nothing here reads its kind."""
    scheme, _, path = url.partition("://")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise ValueError(f"{scheme}:// needs a package: {str(error).splitlines()[0]}") from None
    except ValueError:
        raise ValueError(f"{scheme}:// is not known; a path, or a URL such as s3://bucket/runs, is right") from None
    if not path.strip("/"):
        raise ValueError(f"{scheme}:// and what? a bucket or folder is right, for example {scheme}://bucket/runs")
    return f"{scheme}://{path.rstrip('/')}"


def absolute(place: str) -> str:
    """A path or URL for processes that run in another folder. Raises ValueError as `checked` does."""
    return checked(place) if is_url(place) else str(Path(place).expanduser().absolute())


class Remote:
    """A folder at a URL. Files go by their names, counted from it. Threads may share it.

    What trying again cannot mend (no such bucket, not allowed) is a ConfigError at once; a store that does not answer
    for `patience_s` seconds is a RunError. An object store has a file as a whole or not at all.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.patience_s = PATIENCE_S
        self._answered = False  # at any time
        self._opened: tuple[int, Any, str] | None = None  # by which process: asynchronous ones do not survive a fork

    def check(self) -> None:
        """Write, list and remove a small file. Raises ConfigError where that cannot be."""
        name = f"{PROBE}-{os.getpid()}"
        self.write(name, b"may be deleted")
        self.names()
        self.remove(name)

    def read(self, name: str) -> bytes | None:
        """None where there is no such file at the store."""
        try:
            return self._again(f"{name} cannot be read", lambda fs, root: fs.cat_file(f"{root}/{name}"), missing=True)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        self._again(f"{name} cannot be written", functools.partial(_write, name=name, data=data))

    def names(self, below: str = "") -> list[str]:
        """All files at the store in a folder and those in it, sorted."""
        try:
            found = self._again("cannot be listed", functools.partial(_names, below=below), missing=True)
        except FileNotFoundError:
            return []
        return sorted(found)

    def remove(self, *names: str) -> None:
        """From the store, in this order; those that are not there too."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                remove = functools.partial(_remove, name=name)
                self._again(f"{name} cannot be deleted", remove, missing=True)

    def get(self, name: str, path: Path) -> None:
        """One file from there. Raises FileNotFoundError where there is none."""
        self._again(f"{name} cannot be read", functools.partial(_get, name=name, path=path), missing=True)

    def put(self, name: str, path: Path) -> None:
        """One file to there. A file that somebody appends to comes as it was at some moment."""
        self._again(f"{name} cannot be written", functools.partial(_put, name=name, path=path))

    def _again(self, what: str, call: Callable[[Any, str], T], *, missing: bool = False) -> T:
        """`call` with the file system and the root in it, until it does. missing: a FileNotFoundError goes through."""
        started, wait_s = time.monotonic(), FIRST_WAIT_S
        while True:
            try:
                value = call(*self._file_system())
                self._answered = True
                return value
            except Exception as error:  # each kind of store has errors of its own
                if missing and isinstance(error, FileNotFoundError):
                    self._answered = True
                    raise
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise  # this node's disk
                told = f"{self.url}: {what}: {_reason(error)}"
                if _is_final(error, self._answered):
                    raise ConfigError(told) from error
                waited_s = time.monotonic() - started
                if waited_s > self.patience_s:
                    raise RunError(f"{told}, for {waited_s:.0f} s; the same command goes on when it answers") from error
                if wait_s == FIRST_WAIT_S:
                    log.warning("%s; trying again for %.0f s", told, self.patience_s)
                time.sleep(random.uniform(wait_s / 2, wait_s))  # ranks and runs do not come back all at once
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _file_system(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            for package in ("botocore", "aiobotocore"):  # or they say where they found credentials
                logging.getLogger(package).setLevel(logging.WARNING)
            fs, root = fsspec.url_to_fs(self.url, use_listings_cache=False)
            self._opened = os.getpid(), fs, root.rstrip("/")
        return self._opened[1:]


def _names(fs: Any, root: str, below: str) -> list[str]:
    folder = f"{root}/{below}".rstrip("/")
    inside = [path for path in fs.find(folder) if path.startswith(f"{folder}/")]
    return [path[len(root) + 1 :] for path in inside if not path.endswith("/")]  # Ray and consoles mark folders so


def _remove(fs: Any, root: str, name: str) -> None:
    fs.rm_file(f"{root}/{name}")


def _write(fs: Any, root: str, name: str, data: bytes) -> None:
    _make_folder_of(fs, f"{root}/{name}")
    fs.pipe_file(f"{root}/{name}", data)


def _put(fs: Any, root: str, name: str, path: Path) -> None:
    _make_folder_of(fs, f"{root}/{name}")
    fs.put_file(str(path), f"{root}/{name}")


def _make_folder_of(fs: Any, path: str) -> None:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if not set(protocols) & set(WITHOUT_FOLDERS):
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def _get(fs: Any, root: str, name: str, path: Path) -> None:
    fs.get_file(f"{root}/{name}", str(path))


def _is_final(error: Exception, answered: bool) -> bool:
    """Whether trying again would say the same; answered: whether the store has ever done what it was asked to."""
    from botocore import exceptions

    if isinstance(error, exceptions.BotoCoreError):  # those that s3fs does not translate
        return not isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError)
    if isinstance(error, PermissionError | FileNotFoundError | TypeError | ValueError | ImportError):
        return True
    return not answered and isinstance(error, OSError) and error.errno in REFUSALS


def _reason(error: Exception) -> str:
    """One line, with what would be right where that is known."""
    told = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return f"{told}; make the bucket or name another"
    if isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        return f"{told}; credentials that may read, write, list and delete there are right"
    return told
