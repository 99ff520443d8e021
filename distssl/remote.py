"""Files at a URL: s3:// or another kind that fsspec reads. Where it does not answer, it is asked again for minutes."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from distssl import stores
from distssl.errors import ConfigError, RunError
from distssl.stores import Waits

T = TypeVar("T")

PATIENCE_S = 300.0  # with a store that does not answer
WAITS = Waits(first_s=0.5, longest_s=20.0)
PROBE = ".probe"
CREDENTIALS = "credentials that may read, write, list and delete there are right"
RIGHT = {401: CREDENTIALS, 403: CREDENTIALS, 404: "make the bucket or name another"}  # by status


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

        def once() -> T:
            value = call(*self._file_system())
            self._answered = True
            return value

        told = f"{self.url}: {what}"
        try:
            return stores.patiently(once, self.patience_s, WAITS, told, lambda: self._answered)
        except stores.GaveUpError as error:
            raise RunError(
                f"{told}: {error}, for {self.patience_s:.0f} s; the same command goes on when it answers"
            ) from error
        except ConfigError:
            raise
        except Exception as error:
            if missing and isinstance(error, FileNotFoundError):
                self._answered = True
                raise
            if stores.is_refused(error) or isinstance(error, TypeError | ValueError | ImportError):
                raise ConfigError(f"{told}: {_refusal(error)}") from error
            raise

    def _file_system(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            fs = stores.connect(self.url)
            self._opened = os.getpid(), fs, fs._strip_protocol(self.url).rstrip("/")
        return self._opened[1:]


def _refusal(error: Exception) -> str:
    """With what would be right where that is known."""
    nobody = "Credentials" in type(error).__name__  # to ask as
    right = CREDENTIALS if nobody else RIGHT.get(stores.status(error) or 0)
    return f"{stores.said(error)}; {right}" if right else stores.said(error)


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
    if not set(protocols) & set(stores.OF_OBJECTS):
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def _get(fs: Any, root: str, name: str, path: Path) -> None:
    fs.get_file(f"{root}/{name}", str(path))
