"""`index`: existing WebDataset tars, where they lie, become `index.parquet` and `dataset.json`.

Every tar's result is kept in `.index/` under a name made of the tar's path, bytes, modification time and the index's
options, so an interrupted indexing goes on and a second one, after tars were added, reads the new ones only.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distssl import atomic
from distssl.data import annotations, tars
from distssl.errors import ConfigError

log = logging.getLogger(__name__)

VERSION = 3
MAX_PIXELS = 178_956_970  # where PIL too begins to suspect a decompression bomb
DATASET, INDEX, REJECTED, PARTS, PACKED = "dataset.json", "index.parquet", "rejected.jsonl", ".index", "pack.json"
FIRST_NAMED = 20  # of the rejected, in dataset.json and in the log, and of the bad annotations
PLACES = {kind: (f"{kind}_offset", f"{kind}_size") for kind in annotations.KINDS}  # an annotation's columns
COLUMNS = [
    pa.field("key", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("size", pa.int64()),
    pa.field("height", pa.int32()),
    pa.field("width", pa.int32()),
    pa.field("label", pa.int32()),
    *(pa.field(name, pa.int64()) for names in PLACES.values() for name in names),
]
PART_SCHEMA = pa.schema(COLUMNS)
INDEX_SCHEMA = pa.schema([pa.field("shard", pa.int32()), *COLUMNS])
META = b"distssl"  # the key of our metadata in a parquet file

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """One tar's finished scan: its rows lie in `file`, the rest is here."""

    tar: Path
    file: Path
    num_bytes: int
    sha256: str
    rows_digest: str
    num_samples: int
    num_labelled: int
    max_label: int
    bad_labels: int
    num_annotated: dict[str, int]
    bad_annotations: dict[str, int]
    first_bad: list[dict]  # of the annotations
    rejected: list[dict]


def index(
    url: str,
    out: Path | None = None,
    *,
    verify: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
    key: str = "url",
) -> Path:
    """Indexes the tars that `url` (a folder, a tar, a glob, a brace pattern) names and returns the index's folder.

    `out` defaults to the tars' own folder. With `verify` every image is decoded by DALI; images of more than
    `max_pixels` are left out before anything decodes them. `progress(done, total)` counts tars. Bad tars and images are
    named in `rejected.jsonl`. Raises ConfigError: nothing there, nothing usable, `out` not writable or the index of
    other tars.
    """
    paths = tars.expand(url, key=key)
    out = out.resolve() if out is not None else default_folder(url, paths)
    atomic.make_folder(out)
    with atomic.locked(out):
        return index_locked(paths, out, f"{key}={url}", verify=verify, max_pixels=max_pixels, progress=progress)


def index_locked(
    paths: Sequence[Path],
    out: Path,
    title: str,
    *,
    verify: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
) -> Path:
    """`index` for a caller that holds `atomic.locked(out)`; `paths` absolute and sorted."""
    _refuse_other_shards(paths, out)
    parts = _scan_all(paths, out, verify=verify, max_pixels=max_pixels, progress=progress)
    rejected = [line for part in parts for line in part.rejected]
    used = [part for part in parts if part.num_samples]
    if not used:
        first = f"; the first: {rejected[0]['shard']}: {rejected[0]['reason']}" if rejected else ""
        raise ConfigError(f"{title}: no usable image in {len(paths)} tars{first}")
    classes = _classes(used[0].tar.parent, max(part.max_label for part in used))
    fingerprint = _digest(json.dumps([VERSION, [(part.sha256, part.rows_digest) for part in used], classes]))
    bad_annotations = {kind: sum(part.bad_annotations[kind] for part in used) for kind in annotations.KINDS}
    _log_rejected(title, rejected, sum(part.bad_labels for part in used))
    _log_bad_annotations(title, [line for part in used for line in part.first_bad], bad_annotations)
    with atomic.replacing(out / INDEX) as file:
        _merge(used, file, fingerprint)
    with atomic.replacing(out / REJECTED) as file:
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rejected), encoding="utf-8")
    description = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "samples": sum(part.num_samples for part in used),
        "labelled": sum(part.num_labelled for part in used),
        "bad_labels": sum(part.bad_labels for part in used),
        "annotated": {kind: sum(part.num_annotated[kind] for part in used) for kind in annotations.KINDS},
        "bad_annotations": bad_annotations,
        "classes": classes,
        "rejected": {
            "count": len(rejected),
            "by_reason": dict(collections.Counter(line["kind"] for line in rejected).most_common()),
            "first": rejected[:FIRST_NAMED],
        },
        "shards": [
            {
                "path": _written_path(part.tar, out),
                "bytes": part.num_bytes,
                "sha256": part.sha256,
                "samples": part.num_samples,
            }
            for part in used
        ],
    }
    with atomic.replacing(out / DATASET) as file:  # last: a folder with it is complete
        file.write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return out


def default_folder(url: str, paths: Sequence[Path]) -> Path:
    """The tars' own folder, or one in it where `url` names only some of its tars. Raises ConfigError for several."""
    folders = {path.parent for path in paths}
    if len(folders) > 1:
        raise ConfigError(f"out: {url} lies in {len(folders)} folders, so say where the index goes")
    (folder,) = folders
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"out: {folder} cannot be written, so say where the index goes")
    if set(tars.expand(str(folder))) == set(paths):
        return folder
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(url).name.removesuffix(".tar"))
    return folder / f"{name}.index"


def _scan_all(
    paths: Sequence[Path], out: Path, *, verify: bool, max_pixels: int, progress: Progress | None
) -> list[Part]:
    probe = None
    if verify:
        from distssl.data.probe import Probe  # DALI takes seconds to import

        probe = Probe()
    (out / PARTS).mkdir(exist_ok=True)
    parts: list[Part] = []
    for done, path in enumerate(paths, start=1):
        file = out / PARTS / (_part_name(path, max_pixels, verify) + ".parquet")
        part = _read_part(path, file)
        if part is None:
            scan = tars.scan(path, max_pixels=max_pixels, probe=probe)
            with atomic.replacing(file) as temporary:
                _write_part(scan, temporary)
            part = _read_part(path, file)
            assert part is not None
        parts.append(part)
        if progress:
            progress(done, len(paths))
    wanted = {part.file.name for part in parts}
    for stale in (out / PARTS).iterdir():
        if stale.name not in wanted:
            stale.unlink()
    return parts


def _part_name(path: Path, max_pixels: int, verify: bool) -> str:
    try:
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns]
    except OSError:  # the scan says so
        state = []
    return _digest(json.dumps([VERSION, str(path), state, max_pixels, verify]))


def _write_part(scan: tars.Scan, file: Path) -> None:
    columns = list(zip(*scan.rows, strict=True)) or [[] for _ in COLUMNS]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, COLUMNS, strict=True)]
    column = dict(zip(PART_SCHEMA.names, columns, strict=True))
    labels, bad = column["label"], scan.bad_annotations
    meta = {
        "num_bytes": scan.num_bytes,
        "sha256": scan.sha256,
        "rows_digest": _digest(json.dumps(scan.rows)),
        "num_labelled": sum(label >= 0 for label in labels),
        "max_label": max(labels, default=-1),
        "bad_labels": scan.bad_labels,
        "num_annotated": {kind: sum(size > 0 for size in column[names[1]]) for kind, names in PLACES.items()},
        "bad_annotations": {kind: sum(line.kind == kind for line in bad) for kind in annotations.KINDS},
        "first_bad": [dataclasses.asdict(line) for line in bad[:FIRST_NAMED]],
        "rejected": [dataclasses.asdict(rejected) for rejected in scan.rejected],
    }
    schema = PART_SCHEMA.with_metadata({META: json.dumps(meta).encode()})
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), file, compression="zstd")


def _read_part(tar: Path, file: Path) -> Part | None:
    """None where there is no such part or it is unreadable."""
    try:
        found = pq.read_metadata(file)
        meta = json.loads((found.metadata or {})[META])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return None
    return Part(tar=tar, file=file, num_samples=found.num_rows, **meta)


def _merge(parts: Sequence[Part], file: Path, fingerprint: str) -> None:
    """A row group per tar; one tar's rows in memory at a time."""
    schema = INDEX_SCHEMA.with_metadata({META: json.dumps({"version": VERSION, "fingerprint": fingerprint}).encode()})
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for shard, part in enumerate(parts):
            table = pq.read_table(part.file, schema=PART_SCHEMA)
            column = pa.array([shard], pa.int32()).take(pa.array([0] * table.num_rows, pa.int32()))
            rows = pa.Table.from_arrays([column, *table.columns], schema=schema)
            writer.write_table(rows, row_group_size=max(1, table.num_rows))


def _refuse_other_shards(paths: Sequence[Path], out: Path) -> None:
    """An index is replaced only by one of the same tars and more."""
    try:
        text = (out / DATASET).read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    try:
        listed = [out / shard["path"] for shard in json.loads(text)["shards"]]
    except (ValueError, KeyError, TypeError):
        return  # damaged: indexing again is the way to mend it
    other = [path for path in listed if path not in set(paths) and path.exists()]
    if other:
        raise ConfigError(f"out: {out} holds the index of other tars ({other[0]}); give another folder")


def _classes(folder: Path, max_label: int) -> list[str]:
    """Names from `pack`, where it wrote these tars, else the numbers."""
    try:
        names = json.loads((folder / PACKED).read_text(encoding="utf-8"))["classes"]
    except (OSError, ValueError, KeyError):
        names = []
    return names if len(names) > max_label else [str(i) for i in range(max_label + 1)]


def _log_rejected(title: str, rejected: Sequence[dict], bad_labels: int) -> None:
    for line in rejected[:FIRST_NAMED]:
        log.warning(
            "%s: left out %s at byte %d of %s: %s",
            title,
            line["key"] or "all",
            line["offset"],
            line["shard"],
            line["reason"],
        )
    if len(rejected) > FIRST_NAMED:
        log.warning("%s: left out %d in all; %s names each", title, len(rejected), REJECTED)
    if bad_labels:
        log.warning("%s: %d samples have a .cls that is no class number: they count as unlabelled", title, bad_labels)


def _log_bad_annotations(title: str, first: Sequence[dict], count: dict[str, int]) -> None:
    for line in first[:FIRST_NAMED]:
        log.warning(
            "%s: kept %s of %s without its %s: %s", title, *(line[at] for at in ("key", "shard", "kind", "reason"))
        )
    for kind, num in count.items():
        if num:
            log.warning("%s: %d samples are kept without their .%s", title, num, annotations.MEMBERS[kind])


def _written_path(tar: Path, out: Path) -> str:
    """Relative where the tar lies under the index, so that the folder can be moved."""
    return tar.relative_to(out).as_posix() if tar.is_relative_to(out) else str(tar)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
