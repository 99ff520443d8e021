"""A run folder that lies at a URL (s3:// or another that fsspec reads), and its working copy on this node.

A file at the store is whole or not there, as an object store has it; what must be seen in an order is put there in
that order. The store is right where the two differ, but for what this process has changed since.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from distssl import atomic
from distssl.errors import ConfigError, RunError
from distssl.remote import Remote

log = logging.getLogger(__name__)

PUSH_EVERY_S = 5.0
PUSH_BYTES_PER_S = 1 << 20  # what grows long is put there less often, but for the times that it has to be
LAST_PATIENCE_S = 10.0  # where the run has failed already
RECORDS = ("", "pictures")  # folders whose files tell of the run


def working_copy(url: str, name: str, folder: Path) -> Path:
    """Where under a local folder the run `name` of a storage URL is worked on."""
    return folder / hashlib.sha256(url.encode()).hexdigest()[:12] / name


class Mirror:
    """Two copies of a tree: `folder` on this node and `remote`. Files go by their names, counted from both.

    Threads may share it. Raises as `Remote` does.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.remote = folder, Remote(url)
        self.lock = threading.RLock()
        self._known: dict[str, tuple[int, int]] = {}  # name -> bytes and mtime of what is the same at both
        self._pushed_at: dict[str, float] = {}

    def name(self, path: Path) -> str:
        """Of a path in the working copy; that of the folder itself is empty."""
        return "/".join(path.relative_to(self.folder).parts)

    def put(self, name: str) -> None:
        """One file to the store. A file that somebody appends to comes as it was at some moment."""
        path = self.folder / name
        now = _signature(path)
        self.remote.put(name, path)
        if now:
            self._known[name], self._pushed_at[name] = now, time.monotonic()

    def pull(self, below: str = "", *, exactly: bool = False) -> None:
        """The files of one folder, without those in folders of it, into the working copy.

        exactly: what is not at the store goes from the working copy.
        """
        with self.lock:
            there = [name for name in self.remote.names(below) if _folder_of(name) == below and not _hidden(name)]
            if exactly:
                for name in self._here(below):
                    if name not in there:
                        (self.folder / name).unlink()
            for name in there:
                self.pull_file(name)

    def pull_file(self, name: str) -> None:
        """One file into the working copy, where it is at the store."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            with atomic.replacing(path) as part:
                self.remote.get(name, part)
            if now := _signature(path):
                self._known[name] = now

    def push(self, *below: str, gently: bool = False) -> None:
        """The files of some folders that have changed, without those in folders of them, to the store.

        gently: large ones only now and then.
        """
        with self.lock:
            for name in (name for folder in below for name in self._here(folder)):
                now = _signature(self.folder / name)
                if now is None or now == self._known.get(name):
                    continue
                waited_s = time.monotonic() - self._pushed_at.get(name, -float("inf"))
                if not gently or waited_s > now[0] / PUSH_BYTES_PER_S:
                    self.put(name)

    @contextlib.contextmanager
    def pushing(self) -> Iterator[None]:
        """Push the records every few seconds while the block runs, and once more when it has ended."""
        done = threading.Event()
        thread = threading.Thread(target=self._keep_pushing, args=(done,), name="mirror", daemon=True)
        thread.start()
        try:
            yield
        except Exception:
            done.set()
            self._push_last()
            raise
        finally:
            done.set()
        thread.join()
        self.push(*RECORDS)

    def _keep_pushing(self, done: threading.Event) -> None:
        while not done.wait(PUSH_EVERY_S):
            try:
                self.push(*RECORDS, gently=True)
            except (ConfigError, RunError) as error:  # the next checkpoint, or the end, raises it
                log.warning("%s", error)

    def _push_last(self) -> None:
        """What a failing run has to tell, if the store takes it; the run's own error is what counts."""
        patient, self.remote.patience_s = self.remote.patience_s, LAST_PATIENCE_S
        try:
            self.push(*RECORDS)
        except (ConfigError, RunError) as error:
            log.warning("%s", error)
        finally:
            self.remote.patience_s = patient

    def _here(self, below: str) -> list[str]:
        folder = self.folder / below
        found = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        names = [path.relative_to(self.folder).as_posix() for path in found]
        return sorted(name for name in names if not _hidden(name))


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns
