"""A remote file as `tarfile` wants one, and parts of it that come when they are looked at.

Reads fetch windows, small ones after a jump and larger ones in a row, so that headers cost little where files are large
and requests are few where they are small.
"""

from __future__ import annotations

import collections
import threading
from typing import overload

from distssl import stores
from distssl.data import transfer

WINDOW, LARGEST_WINDOW = 32 << 10, 1 << 20  # bytes a request; an image's header seldom needs more
KEPT = 2 << 20  # bytes of windows: a sample is looked at again when its last member is known


class RangedFile:
    """Read-only, by ranged requests that are tried again for `retry_s` seconds. One thread at a time.

    stop: ends the reading, by StoppedError, when it is set.
    """

    def __init__(self, url: str, retry_s: float, window: int = WINDOW, stop: threading.Event | None = None) -> None:
        self.url = url
        self.stop = stop
        self.retry_s = retry_s
        self.window = window
        self._object = transfer.opened(url, retry_s, stop)
        self.size = self._object.size
        self.tag = self._object.tag
        self._at = 0
        self._windows: collections.OrderedDict[int, bytes] = collections.OrderedDict()  # by where they begin
        self._end = 0  # of the window fetched last
        self._length = window  # of it

    def seek(self, at: int) -> int:
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self.size if size < 0 else self._at + size
        data = self.between(self._at, end)
        self._at += len(data)
        return data

    def between(self, start: int, end: int) -> bytes:
        """The bytes from start to end, fewer at the end of the file."""
        end = min(end, self.size)
        if start >= end:
            return b""
        for first, window in self._windows.items():
            if first <= start and end <= first + len(window):
                self._windows.move_to_end(first)
                return window[start - first : end - first]
        if self.stop is not None and self.stop.is_set():
            raise stores.StoppedError
        in_a_row = self._windows and self._end - self._length <= start <= self._end
        length = min(2 * self._length, max(LARGEST_WINDOW, self.window)) if in_a_row else self.window
        last = min(max(end, start + length), self.size)
        window = transfer.patiently(self.url, lambda: self._object.read(start, last), self.retry_s, self.stop)
        self._windows[start], self._end, self._length = window, last, length
        while len(self._windows) > 2 and sum(map(len, self._windows.values())) > KEPT:
            self._windows.popitem(last=False)
        return window[: end - start]


class Span:
    """The bytes of a member, fetched when they are looked at; `span[:]` is all of them."""

    def __init__(self, file: RangedFile, start: int, size: int) -> None:
        self._file = file
        self._start = start
        self._size = size

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> bytes: ...
    def __getitem__(self, at: int | slice) -> int | bytes:
        if isinstance(at, slice):
            first, last, _ = at.indices(self._size)
            return self._file.between(self._start + first, self._start + last)
        if not 0 <= at < self._size:
            raise IndexError(at)
        return self._file.between(self._start + at, self._start + at + 1)[0]
