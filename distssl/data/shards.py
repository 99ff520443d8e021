"""The shards' front door: `pack` a source, `index` tars, `prepare` whatever `data.source` names, open the `Dataset`."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path

from distssl import atomic, stores
from distssl.data import expansion, indexing, locations, packing, sources, transfer
from distssl.data.dataset import Dataset, Rows
from distssl.data.locations import Place
from distssl.errors import ConfigError

__all__ = ["Dataset", "Rows", "index", "pack", "prepare"]

log = logging.getLogger(__name__)

pack = packing.pack
index = indexing.index


def prepare(
    source: str,
    cache_dir: Path,
    *,
    progress: packing.Progress | None = None,
    key: str = "data.source",
    retry_s: float = transfer.RETRY_S,
) -> Place:
    """The folder, or URL, of the indexed data set that `source` means, made where it is not there yet.

    A folder with a dataset.json is used as it is; tars are indexed where they lie, or in `cache_dir` where they cannot
    be written beside; anything else is packed into `cache_dir` once, and again when the source or the index's
    version has changed. Raises ConfigError, naming `key`, and RunError where a store does not answer for `retry_s`.
    """
    if not source:
        raise ConfigError(f"{key}: is empty; give a folder, zip, CSV, tars or the name of a data set")
    if locations.is_url(source):
        return _prepare_remote(source, cache_dir, progress, key, retry_s)
    path = stores.local(source)
    with locations.reading(f"{key}={source}"):
        if (path / indexing.DATASET).exists():
            return path.resolve()
        names_tars = _names_tars(source, path)
    if names_tars:
        return _index_tars(source, cache_dir, progress, key)
    identity = f"{indexing.VERSION} {sources.identity(source, key=key)}"
    folder = cache_dir / f"{_plain(source)}-{_digest(identity)}"
    if (folder / indexing.DATASET).exists():
        log.info("%s=%s is packed in %s", key, source, folder)
        return folder.resolve()
    return pack(source, folder, progress=progress, key=key)


def _prepare_remote(source: str, cache_dir: Path, progress: packing.Progress | None, key: str, retry_s: float) -> Place:
    locations.check(source, key)
    place = source.rstrip("/")
    how = {"progress": progress, "key": key, "cache_dir": cache_dir, "retry_s": retry_s}
    if not expansion.is_pattern(place) and not place.endswith(expansion.SUFFIXES):
        try:
            transfer.read(f"{place}/{indexing.DATASET}", retry_s)
        except transfer.RefusedError as error:
            log.info("%s=%s has no index yet: %s", key, source, error)
        else:
            return place
    try:
        return index(source, **how)
    except indexing.UnwritableError:
        return index(source, cache_dir / f"{_plain(source)}-{_digest(source)}", **how)


def _index_tars(source: str, cache_dir: Path, progress: packing.Progress | None, key: str) -> Place:
    paths = expansion.expand(source, key=key)
    try:
        folder = Path(indexing.default_place(source, paths, key))
        atomic.make_folder(folder)
        with atomic.locked(folder):
            pass
    except ConfigError:  # read-only, or tars in several folders
        folder = cache_dir / f"{_plain(source)}-{_digest(' '.join(map(str, paths)))}"
    return index(source, folder, progress=progress, key=key)


def _names_tars(source: str, path: Path) -> bool:
    if path.is_dir():
        return any(file.suffix == ".tar" for file in path.iterdir())
    return (expansion.is_pattern(source) and not path.exists()) or source.endswith(expansion.SUFFIXES)


def _plain(source: str) -> str:
    name = Path(source).name or "data"
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name.removesuffix(".tar"))[:60]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]
