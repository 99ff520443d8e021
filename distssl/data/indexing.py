"""`index`: existing WebDataset tars, where they lie, become `index.parquet` and `dataset.json`.

Every tar's result is kept in `.index/` under a name made of the tar's path, bytes, modification time and the index's
options, so an interrupted indexing goes on and a second one, after tars were added, reads the new ones only. Of remote
tars only headers are read, by ranged requests; their results are kept in the cache until they are an index.

The fingerprint is made of each tar's rows and sha256 (of a remote tar, which nobody has read whole, size and ETag, or
what else the store says changes with it) and the names of the classes.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from distssl import atomic, config, stores
from distssl.data import expansion, index_parts, locations, tars, transfer
from distssl.data.index_parts import COLUMNS, INDEX_SCHEMA, META, PLACES, Part
from distssl.data.locations import Place
from distssl.errors import ConfigError

__all__ = ["COLUMNS", "INDEX_SCHEMA", "META", "PLACES"]

VERSION = index_parts.VERSION
MAX_PIXELS = 178_956_970  # where PIL too begins to suspect a decompression bomb
DATASET, INDEX, REJECTED, PARTS, PACKED = "dataset.json", "index.parquet", "rejected.jsonl", ".index", "pack.json"
THREADS, VERIFYING_THREADS = 16, 4  # for remote tars, which make a thread wait

Progress = Callable[[int, int], None]
T = TypeVar("T")


class UnwritableError(ConfigError):
    """The index cannot lie beside the tars."""


def index(
    url: str,
    out: Place | None = None,
    *,
    verify: bool | None = None,
    max_pixels: int | None = None,
    progress: Progress | None = None,
    key: str = "url",
    cache_dir: Path | None = None,
    retry_s: float = transfer.RETRY_S,
) -> Place:
    """Indexes the tars that `url` (a folder, a tar, a glob, a brace pattern) names and returns the index's folder.

    `out` defaults to the tars' own folder. With `verify` every image is decoded by DALI; images of more than
    `max_pixels` are left out before anything decodes them. What neither says is as in the index that is there, which on
    a store stays as it is while its tars do. `progress(done, total)` counts tars. Bad tars and images are named in
    `rejected.jsonl`. `cache_dir` keeps what is known of remote tars meanwhile, by default that of a run.
    Raises ConfigError: nothing there, nothing usable, the index of other tars, and UnwritableError where `out` is.
    """
    paths = expansion.expand(url, key=key)
    scan = functools.partial(index_locked, verify=verify, max_pixels=max_pixels, progress=progress, retry_s=retry_s)
    if isinstance(paths[0], Path) and out is not None and locations.is_url(out):
        raise ConfigError(f"out={out}: {url} is on this file system, so a folder is right; copy both to the store")
    home = default_place(url, paths, key) if out is None else out
    if isinstance(home, str) and locations.is_url(home):
        if verify is None and max_pixels is None and _holds(paths, home.rstrip("/"), retry_s):
            return home.rstrip("/")
        return _index_beside(paths, home.rstrip("/"), scan, f"{key}={url}", cache_dir, retry_s)
    folder = Path(home).resolve()
    atomic.make_folder(folder)
    with atomic.locked(folder):
        return scan(paths, folder, f"{key}={url}")


def _index_beside(
    paths: Sequence[Place],
    home: str,
    scan: Callable[..., Path],
    title: str,
    cache_dir: Path | None,
    retry_s: float,
) -> str:
    """Index in a folder of the cache, then put the index on the store; dataset.json last."""
    folder = (cache_dir or config.Machine().cache) / "indexing" / index_parts.digest(home)
    atomic.make_folder(folder)
    with atomic.locked(folder):
        known = _read(f"{home}/{DATASET}", retry_s)
        scan(paths, folder, title, home=home)
        if known is not None and known == (folder / DATASET).read_bytes():
            return home
        try:
            for name in (INDEX, REJECTED, DATASET):
                transfer.write(f"{home}/{name}", folder / name, retry_s)
        except transfer.RefusedError as error:
            raise UnwritableError(f"out={home}: cannot be written, so say where the index goes: {error}") from error
    return home


def index_locked(
    paths: Sequence[Place],
    out: Path,
    title: str,
    *,
    home: str | None = None,
    verify: bool | None = None,
    max_pixels: int | None = None,
    progress: Progress | None = None,
    retry_s: float = transfer.RETRY_S,
) -> Path:
    """`index` for a caller that holds `atomic.locked(out)`; `paths` absolute and sorted.

    home: the URL the index will lie at, if it is made for one. What verify and max_pixels do not say is as in the index
    that is there, else not verified and MAX_PIXELS.
    """
    place = home or out
    known, listed = _known(place, retry_s)
    _refuse_other_shards(paths, listed, place, retry_s)
    verify = known.get("verify") is True if verify is None else verify
    max_pixels = int(known.get("max_pixels", MAX_PIXELS)) if max_pixels is None else max_pixels
    parts = _scan_all(paths, out, verify=verify, max_pixels=max_pixels, progress=progress, retry_s=retry_s)
    rejected = [line for part in parts for line in part.rejected]
    used = [part for part in parts if part.num_samples]
    if not used:
        first = f"; the first: {rejected[0]['shard']}: {rejected[0]['reason']}" if rejected else ""
        raise ConfigError(f"{title}: no usable image in {len(paths)} tars{first}")
    classes = _classes(used, title, retry_s)
    contents = [(part.content, part.rows_digest) for part in used]
    fingerprint = index_parts.digest(json.dumps([VERSION, contents, classes]))
    found = index_parts.described(parts, place)
    index_parts.log_left_out(title, found, [line for part in parts for line in part.first_bad], REJECTED)
    with atomic.replacing(out / INDEX) as file:
        index_parts.merge(used, file, fingerprint)
    with atomic.replacing(out / REJECTED) as file:
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rejected), encoding="utf-8")
    description = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "verify": verify,
        "max_pixels": max_pixels,
        "classes": classes,
        **found,
    }
    with atomic.replacing(out / DATASET) as file:  # last: a folder with it is complete
        file.write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return out


def default_place(url: str, paths: Sequence[Place], key: str = "url") -> Place:
    """The tars' own folder, or one in it where `url` names only some of its tars. Raises ConfigError for several."""
    folders = {locations.parent(path) for path in paths}
    if len(folders) > 1:
        raise ConfigError(f"out: {url} lies in {len(folders)} folders, so say where the index goes")
    (folder,) = folders
    if isinstance(folder, Path) and not os.access(folder, os.W_OK):
        raise UnwritableError(f"out: {folder} cannot be written, so say where the index goes")
    if stores.scheme(url) in stores.HTTP or set(expansion.expand(str(folder), key=key)) == set(paths):
        return folder
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in locations.name(url).removesuffix(".tar"))
    return locations.join(folder, f"{name}.index")


def _scan_all(
    paths: Sequence[Place], out: Path, *, verify: bool, max_pixels: int, progress: Progress | None, retry_s: float
) -> list[Part]:
    probe = None
    if verify:
        from distssl.data.probe import Probe  # DALI takes seconds to import

        probe = Probe()
    (out / PARTS).mkdir(exist_ok=True)

    stop = threading.Event()

    def scanned(path: Place) -> Part:
        file = out / PARTS / f"{index_parts.name(path, max_pixels, verify, retry_s)}.parquet"
        part = index_parts.read(path, file)
        if part is None:
            scan = tars.scan(path, max_pixels=max_pixels, probe=probe, retry_s=retry_s, stop=stop)
            with atomic.replacing(file) as temporary:
                index_parts.write(scan, temporary)
            part = index_parts.read(path, file)
            assert part is not None
        return part

    parts: list[Part] = []
    num_threads = (VERIFYING_THREADS if verify else THREADS) if isinstance(paths[0], str) else 1
    with _mapped(scanned, paths, num_threads, stop) as results:
        for part in results:
            parts.append(part)
            if progress:
                progress(len(parts), len(paths))
    wanted = {part.file.name for part in parts}
    for stale in (out / PARTS).iterdir():
        if stale.name not in wanted:
            stale.unlink()
    return parts


@contextmanager
def _mapped(
    function: Callable[[Place], T], paths: Sequence[Place], num_threads: int, stop: threading.Event
) -> Iterator[Iterator[T]]:
    """`map`, by several threads if asked to, which `stop` ends: set when one fails, or somebody presses Ctrl-C."""
    if num_threads == 1:
        yield map(function, paths)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            yield pool.map(function, paths)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _known(place: Place, retry_s: float) -> tuple[dict[str, Any], dict[Place, dict[str, Any]]]:
    """dataset.json and its shards by place; nothing where there is none or a damaged one, which indexing mends."""
    text = _read(locations.join(place, DATASET), retry_s)
    try:
        found = json.loads(text or b"{}")
        return found, {locations.join(place, shard["path"]): shard for shard in found["shards"]}
    except (ValueError, KeyError, TypeError):
        return {}, {}


def _refuse_other_shards(paths: Sequence[Place], listed: Iterable[Place], place: Place, retry_s: float) -> None:
    """An index is replaced only by one of the same tars and more."""
    wanted = set(paths)
    other = next((path for path in listed if path not in wanted and _exists(path, retry_s)), None)
    if other is not None:
        raise ConfigError(f"out: {place} holds the index of other tars ({other}); give another folder")


def _holds(paths: Sequence[Place], home: str, retry_s: float) -> bool:
    """Whether the index on a store is of these very tars; a sha256 in it is checked when the tar is read."""
    known, listed = _known(home, retry_s)
    if known.get("version") != VERSION or set(listed) != set(paths):
        return False
    stop = threading.Event()

    def same(path: Place) -> bool:
        found, shard = transfer.opened(str(path), retry_s, stop), listed[path]
        as_tagged = bool(found.tag) and found.tag == shard.get("etag")
        return found.size == shard.get("bytes") and (as_tagged or bool(shard.get("sha256")))

    try:
        with _mapped(same, paths, THREADS, stop) as results:
            return all(results)
    except transfer.RefusedError:  # indexing says which
        return False


def _exists(path: Place, retry_s: float) -> bool:
    try:
        return path.exists() if isinstance(path, Path) else bool(transfer.opened(path, retry_s))
    except transfer.RefusedError:
        return False


def _read(path: Place, retry_s: float) -> bytes | None:
    """A small file; None where there is none. Raises ConfigError where one on this file system cannot be read."""
    with locations.reading(str(path)):
        try:
            return path.read_bytes() if isinstance(path, Path) else transfer.read(path, retry_s)
        except (FileNotFoundError, transfer.RefusedError):
            return None


def _classes(used: Sequence[Part], title: str, retry_s: float) -> list[str]:
    """Names from `pack`, where it wrote these tars, else the numbers. Raises ConfigError where folders differ."""
    labelled = [part for part in used if part.num_labelled] or used[:1]
    max_label: dict[Place, int] = {}
    for part in labelled:
        folder = locations.parent(part.tar)
        max_label[folder] = max(part.max_label, max_label.get(folder, -1))
    (first, names), *others = ((folder, _packed_classes(folder, at, retry_s)) for folder, at in max_label.items())
    for folder, other in others:
        if other != names:
            pairs = enumerate(itertools.zip_longest(names, other, fillvalue="without a name"))
            i, (here, there) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            raise ConfigError(
                f"{title}: class {i} is {here} in {first} and {there} in {folder}; index them apart, or give both "
                f"folders a {PACKED} with the same classes where their numbers mean the same"
            )
    return names or [str(i) for i in range(max(max_label.values()) + 1)]


def _packed_classes(folder: Place, max_label: int, retry_s: float) -> list[str]:
    """What `pack` called the classes of the tars in a folder; [] where it did not, or not all of them."""
    text = _read(locations.join(folder, PACKED), retry_s)
    try:
        names = json.loads(text or b"{}")["classes"]
    except (ValueError, KeyError, TypeError):
        return []
    return names if isinstance(names, list) and len(names) > max_label else []
