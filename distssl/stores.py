"""Stores at URLs, of S3, HTTP or whatever fsspec reads: what opens one, what its errors mean, and patience with it."""

from __future__ import annotations

import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from distssl import atomic
from distssl.errors import ConfigError, RunError

log = logging.getLogger(__name__)

T = TypeVar("T")

HTTP = ("http", "https")
# An object is there whole or not at all, and folders come with their files: to ask s3fs for one may make a bucket.
OF_OBJECTS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory")
RETRIED = (408, 409, 425, 429)  # HTTP statuses below 500 that another try may mend
CLEAR = (401, 403, 404)  # those that are never an accident on the way
# What no store says: a mistake of the user's or of ours.
OURS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, RunError),
    *(TypeError, ValueError),
)
TOLD_S = 0.5  # a shorter wait is not worth a word

_jitter = random.SystemRandom()  # of the machine: nothing of a run is drawn from it


class StoppedError(Exception):
    """Nobody waits for this any more."""


class GaveUpError(Exception):
    """The time is up; says what the last failure did, which is its cause."""


@dataclass(frozen=True)
class Waits:
    """Between tries, in seconds: each twice the one before; up to half of it is left out, or all came at once."""

    first_s: float
    longest_s: float


def is_url(place: str) -> bool:
    return "://" in place


def local(place: str) -> Path:
    """A path of this machine, ~ for the user's home; where ~NAME is nobody's, that is the path's name."""
    return Path(os.path.expanduser(place))  # noqa: PTH111 - Path's own raises there


def scheme(url: str) -> str:
    return url.partition("://")[0]


def checked(url: str) -> str:
    """A URL without the slashes at its end. Raises ValueError where nothing here reads its kind."""
    kind, _, path = url.partition("://")
    _class_of(kind)
    if not path.strip("/"):
        raise ValueError(f"{kind}:// and what? a bucket or folder is right, for example {kind}://bucket/runs")
    return f"{kind}://{path.rstrip('/')}"


def absolute(place: str) -> str:
    """A path or URL for processes that run in another folder. Raises ValueError as `checked` does."""
    return checked(place) if is_url(place) else str(local(place).absolute())


def connect(url: str, **options: Any) -> Any:
    """The fsspec filesystem of a URL. options: of fsspec. Raises ConfigError where nothing here reads its kind."""
    for package in ("botocore", "aiobotocore"):  # or they say where they found credentials
        logging.getLogger(package).setLevel(logging.WARNING)
    try:
        kind = _class_of(scheme(url))
        return kind(use_listings_cache=False, **{**kind._get_kwargs_from_urls(url), **options})
    except (ImportError, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from error


def _class_of(kind: str) -> Any:
    try:
        return fsspec.get_filesystem_class(kind)
    except ImportError as error:
        raise ValueError(f"{kind}:// needs a package: {str(error).splitlines()[0]}") from None
    except ValueError:
        raise ValueError(f"{kind}:// is not known; a path, or a URL such as s3://bucket/folder, is right") from None


def patiently(
    call: Callable[[], T],
    within_s: float,
    waits: Waits,
    what: str,
    answered: Callable[[], bool] = lambda: False,
    stop: threading.Event | None = None,
) -> T:
    """What `call` returns, tried again while a failure may pass. what: is asked for, at the start of a warning.

    answered: as of `is_transient`. Raises a failure that does not pass as it is, GaveUpError when the time is up,
    StoppedError on `stop`.
    """
    deadline, warned = None, False
    for attempt in itertools.count():
        try:
            return call()
        except Exception as error:  # each kind of store has errors of its own
            if not is_transient(error, answered()):
                raise
            now = time.monotonic()
            deadline = now + within_s if deadline is None else deadline
            if now >= deadline:
                raise GaveUpError(said(error)) from error
            wait_s = min(waits.longest_s, waits.first_s * 2**attempt)
            if wait_s >= TOLD_S and not warned:
                log.warning("%s: %s; trying again for up to %g s", what, said(error), within_s)
                warned = True
            if (stop or threading.Event()).wait(min(wait_s * _jitter.uniform(0.5, 1), deadline - now)):
                raise StoppedError from error
    raise AssertionError("unreachable")


def status(error: BaseException) -> int | None:
    """The HTTP status that an exception of fsspec means, None where the server gave none."""
    if isinstance(error, TimeoutError):  # S3 calls its own a 400
        return None
    found, cause = _http_status(error), _cause(error)
    if isinstance(cause, PermissionError):
        return found if found in CLEAR else 403  # a token that has expired is a 400
    if found is None and isinstance(cause, FileNotFoundError):
        return 404
    return found


def _http_status(error: BaseException) -> int | None:
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
    return None


def _cause(error: BaseException) -> BaseException:
    """What happened: fsspec says of every HTTP object whose size it cannot ask for that it is not there."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error


def is_transient(error: BaseException, answered: bool = False) -> bool:
    """Whether the same request may do better in a while: no answer, a cut one, or a server that is overloaded.

    answered: the store has done what it was asked to before, so that only a clear no is one: what S3 makes of a torn
    request is a 400 too.
    """
    from botocore import exceptions

    found, cause = status(error), _cause(error)
    if found is not None:
        return found in RETRIED or (found >= 500 and found != 501) or (answered and found not in CLEAR)
    if isinstance(cause, exceptions.BotoCoreError):
        of_the_way = (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError)
        return isinstance(cause, of_the_way)
    return not isinstance(cause, OURS) and not atomic.is_full_disk(cause)


def is_refused(error: BaseException) -> bool:
    """Of one that does not pass: whether the server has said no, or nobody knows how or as whom to ask it."""
    from botocore import exceptions

    return status(error) is not None or isinstance(error, exceptions.BotoCoreError)


def said(error: BaseException) -> str:
    """What happened, in one line, with the status where there is one."""
    found, cause = status(error), _cause(error)
    text = " ".join(str(getattr(cause, "message", None) or cause).split()).rstrip(".")
    if found is not None:
        return f"{found} {text}"[:200]
    return f"{type(cause).__name__}: {text}"[:200] if text else type(cause).__name__
