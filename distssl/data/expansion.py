"""What a source of tars names: a folder, a tar, a glob or a brace pattern, on this file system or as a URL."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import braceexpand

from distssl import stores
from distssl.data import locations, transfer
from distssl.data.locations import Place
from distssl.errors import ConfigError

COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
SUFFIXES = (".tar", *COMPRESSED_NAMES)
WHAT = "give a folder of tars, a tar, a glob or a brace pattern"


def expand(url: str, *, key: str = "url") -> Sequence[Place]:
    """Absolute paths or URLs of the tars that `url` names, sorted. Raises ConfigError."""
    if locations.is_url(url):
        found: Sequence[Place] = _remote(url, key)
    else:
        with locations.reading(f"{key}={url}"):
            found = _local(url.removeprefix("file://"), key)
    if not found:
        raise ConfigError(f"{key}={url}: holds no *.tar; {WHAT}")
    return found


def is_pattern(url: str) -> bool:
    """Whether it names its files by a glob or by braces."""
    return glob.has_magic(url) or "{" in url


def _local(url: str, key: str) -> list[Path]:
    here = stores.local(url)
    if here.is_dir():
        found = [path for path in here.iterdir() if path.name.endswith(SUFFIXES) and path.name[0] != "."]
    elif here.exists():
        found = [here]
    else:
        found = [path for pattern in _braces(str(here), key, url) for path in _matches(Path(pattern))]
        if not any(path.exists() for path in found):
            raise ConfigError(f"{key}={url}: does not exist; {WHAT}")
    return sorted({path.parent.resolve() / path.name for path in found})


def _braces(pattern: str, key: str, url: str) -> list[str]:
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise ConfigError(f"{key}={url}: braces do not match: {error}") from error


def _matches(pattern: Path) -> list[Path]:
    """What a glob of any shape matches; the path itself where it is no glob, there or not."""
    if not glob.has_magic(str(pattern)):
        return [pattern]
    return list(Path(pattern.anchor or ".").glob(str(pattern.relative_to(pattern.anchor))))


def _remote(url: str, key: str) -> list[str]:
    """Names that are written out are taken as they are, there or not."""
    locations.check(url, key)
    found: set[str] = set()
    for pattern in _braces(url, key, url):
        if pattern.partition("?")[0].endswith(SUFFIXES) and not any(c in pattern for c in "*["):
            found.add(pattern)
        elif stores.scheme(url) in stores.HTTP:
            example = f"{pattern.rpartition('/')[0]}/name-{{000..099}}.tar"
            raise ConfigError(f"{key}={url}: HTTP lists no folders; name the tars one by one, as {example} does")
        else:
            found |= _listed(pattern, key, url)
    return sorted(found)


def _listed(pattern: str, key: str, url: str) -> set[str]:
    store, path = locations.filesystem(pattern)
    try:
        if any(c in pattern for c in "*["):
            names = transfer.patiently(pattern, lambda: store.glob(path))
        else:
            listed = transfer.patiently(pattern, lambda: store.ls(path, detail=False))
            names = [each for each in listed if each.endswith(SUFFIXES) and locations.name(each)[0] != "."]
    except transfer.RefusedError as error:
        raise ConfigError(f"{key}={url}: {error}") from error
    return {store.unstrip_protocol(each) for each in names}
