"""Places that are URLs: objects on S3, GCS, HTTP or whatever fsspec reads.

Filesystems are opened in the process and at the time they are first used: those of fsspec that are asynchronous do not
survive a fork. They do not retry by themselves: how long that is worth is `transfer.patiently`'s to say.
"""

from __future__ import annotations

import functools
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from distssl import stores
from distssl.errors import ConfigError
from distssl.stores import HTTP, scheme

Place = Path | str  # on this file system, or a URL

READ_TIMEOUT_S = 20  # without a byte
CONNECT_TIMEOUT_S = 10


def is_url(place: Place) -> bool:
    """Whether this is no path of this file system."""
    return isinstance(place, str) and stores.is_url(place) and not place.startswith("file://")


def name(place: Place) -> str:
    """The last part: a file's name."""
    path = urlsplit(str(place)).path if is_url(place) else place
    return posixpath.basename(str(path).rstrip("/"))


def parent(place: Place) -> Place:
    """The folder something lies in."""
    return place.parent if isinstance(place, Path) else place.partition("?")[0].rpartition("/")[0]


def join(folder: Place, path: str) -> Place:
    """What `path` means in an index that lies in `folder`: relative to it, absolute, or a URL."""
    if is_url(path):
        return path
    return f"{str(folder).rstrip('/')}/{path}" if is_url(folder) else Path(folder) / path


@contextmanager
def reading(title: str) -> Iterator[None]:
    """Raises ConfigError where a path the user gave cannot be read or cannot be a path."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None or str(error.filename) in title else f"{error.filename} "
        raise ConfigError(f"{title}: {where}cannot be read: {error.strerror}; give what can be read") from error


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path in it. Raises ConfigError for a scheme that cannot be used."""
    opened = _filesystem(os.getpid(), scheme(url))
    return opened, opened._strip_protocol(url)


def check(url: str, key: str) -> None:
    """Raises ConfigError, naming `key`, for a URL of a kind that cannot be read."""
    try:
        filesystem(url)
    except ConfigError as error:
        raise ConfigError(f"{key}={url}: {error}") from error


@functools.lru_cache(maxsize=16)
def _filesystem(_pid: int, protocol: str) -> Any:
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 64, **timeouts}
    elif protocol in HTTP:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
        options["client_kwargs"] = {"timeout": timeout}
    opened = stores.connect(f"{protocol}://", skip_instance_cache=True, **options)
    if protocol in ("s3", "s3a"):
        opened.retries = 1
    return opened


class Object:
    """One remote file, read by ranges. Opening it asks for its size and tag.

    tag: the ETag, or what else changes with the content; "" where the store tells nothing. Where the store can hold to
    it, a range is of this very content or fails.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._filesystem, self._path = filesystem(url)
        self._file = None
        if scheme(url) in ("s3", "s3a"):
            self._file = self._filesystem.open(self._path, "rb", block_size=1 << 20, cache_type="none")
            found = self._file.details
        else:
            found = self._filesystem.info(self._path)
        if found.get("type") == "directory":
            raise FileNotFoundError(f"{url} is a folder")
        if found.get("size") is None:
            raise ConfigError(f"{url}: the server does not tell its size; a store that answers ranged reads is right")
        self.size = int(found["size"])
        self.tag = _tag(found)
        etag = str(found.get("ETag", ""))
        strong = scheme(url) in HTTP and etag.startswith('"')  # If-Match never holds for a weak one
        self._conditions = {"headers": {"If-Match": etag}} if strong else {}

    def read(self, start: int, end: int) -> bytes:
        """The bytes from start to end. Raises EOFError where fewer come, and whatever else fsspec does."""
        if start >= end:
            return b""
        if self._file is not None:
            self._file.seek(start)
            data = self._file.read(end - start)
        else:
            data = self._filesystem.cat_file(self._path, start=start, end=end, **self._conditions)
        if len(data) == self.size > end - start:
            raise ConfigError(f"{self.url}: the server does not answer ranged reads; one that does is right")
        if len(data) != end - start:
            raise EOFError(f"{len(data)} bytes came of {end - start}")
        return cast(bytes, data)


def _tag(found: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "updated", "mtime", "created"):
        if found.get(key):
            return str(found[key]).strip('"')
    return ""


def read(url: str) -> bytes:
    """A small object as a whole."""
    found, path = filesystem(url)
    return found.cat_file(path)


def write(url: str, file: Path) -> None:
    """Puts a local file at `url`, whole or not at all."""
    found, path = filesystem(url)
    if scheme(url) in HTTP:
        found.pipe_file(path, file.read_bytes())
    elif scheme(url) in stores.OF_OBJECTS:
        found.put_file(str(file), path)
    else:
        part = f"{parent(path)}/.{name(path)}.part"
        found.makedirs(parent(path), exist_ok=True)
        found.put_file(str(file), part)
        found.mv(part, path)
