"""Places that are URLs: objects on S3, GCS, HTTP or whatever fsspec reads, and what went wrong with one, in words.

Filesystems are opened in the process and at the time they are first used: those of fsspec that are asynchronous do not
survive a fork. They do not retry by themselves: how long that is worth is `transfer.patiently`'s to say.
"""

from __future__ import annotations

import asyncio
import functools
import os
import posixpath
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import fsspec

from distssl.errors import ConfigError

Place = Path | str  # on this file system, or a URL

READ_TIMEOUT_S = 20  # without a byte
CONNECT_TIMEOUT_S = 10
RETRIED = (408, 425, 429)  # HTTP statuses below 500 that another try may mend
ATOMIC = ("s3", "s3a", "gs", "gcs", "abfs", "az", "http", "https", "memory")  # an object is there whole or not at all
HTTP = ("http", "https")


def is_url(place: Place) -> bool:
    """Whether this is no path of this file system."""
    return isinstance(place, str) and "://" in place and not place.startswith("file://")


def scheme(url: str) -> str:
    return url.partition("://")[0]


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


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path in it. Raises ConfigError for a scheme that cannot be used."""
    opened = _open_filesystem(os.getpid(), scheme(url))
    return opened, opened._strip_protocol(url)


def check(url: str, key: str) -> None:
    """Raises ConfigError, naming `key`, for a URL of a kind that cannot be read."""
    try:
        filesystem(url)
    except ConfigError as error:
        raise ConfigError(f"{key}={url}: {error}") from error


@functools.lru_cache(maxsize=16)
def _open_filesystem(_pid: int, protocol: str) -> Any:
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
        options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, "max_pool_connections": 64, **timeouts}
    elif protocol in HTTP:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        opened = fsspec.filesystem(protocol, skip_instance_cache=True, **options)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{protocol}://: cannot be read: {_line(error)}") from error
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
    elif scheme(url) in ATOMIC:
        found.put_file(str(file), path)
    else:
        part = f"{parent(path)}/.{name(path)}.part"
        found.makedirs(parent(path), exist_ok=True)
        found.put_file(str(file), part)
        found.mv(part, path)


def status(error: BaseException) -> int | None:
    """The HTTP status that an exception of fsspec means, None where the server gave none."""
    import aiohttp

    each: BaseException | None = error
    # The cause of a body that is cut calls itself a 400.
    while each is not None and not isinstance(each, aiohttp.ClientPayloadError):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore's
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for attribute in ("status", "code"):  # aiohttp's and gcsfs's
            if isinstance(getattr(each, attribute, None), int):
                return int(getattr(each, attribute))
        each = each.__cause__
    error = _cause(error)
    if isinstance(error, FileNotFoundError):
        return 404
    return 403 if isinstance(error, PermissionError) else None


def _cause(error: BaseException) -> BaseException:
    """What happened: fsspec says of every HTTP object whose size it cannot ask for that it is not there."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error


def is_transient(error: BaseException) -> bool:
    """Whether the same request may do better in a while: no answer, a cut one, or a server that is overloaded."""
    found = status(error)
    if found is not None:
        return found in RETRIED or found >= 500
    if isinstance(error, NotImplementedError):
        return False
    return isinstance(_cause(error), (OSError, EOFError, asyncio.TimeoutError, *_network_errors()))


def is_refused(error: BaseException) -> bool:
    """Whether the server has said no, or nobody knows as whom to ask it."""
    return status(error) is not None or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError")


@functools.cache
def _network_errors() -> tuple[type[BaseException], ...]:
    import aiohttp
    from botocore import exceptions, parsers

    of_boto = (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError)
    return (aiohttp.ClientError, *of_boto, parsers.ResponseParserError)


def said(error: BaseException) -> str:
    """What happened, in one line, with the status where there is one."""
    found, cause = status(error), _cause(error)
    if found is None:
        return _line(cause)
    return " ".join(f"{found} {getattr(cause, 'message', None) or cause}".split())[:200]


def advice(error: BaseException) -> str:
    """What to check where the server has said no."""
    return {
        401: "check the credentials",
        403: "check the credentials and that they may read it; some stores say 403 of what is not there",
        404: "check the URL, and that nobody has removed it",
        412: "it has changed since it was indexed: index it again",
    }.get(status(error) or 0, "check the URL and the credentials")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
