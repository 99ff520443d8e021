"""A tar's finished scan, kept as a parquet file of its own until an index is made of it, and for the next index."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distssl.data import annotations, tars, transfer
from distssl.data.locations import Place

log = logging.getLogger(__name__)

VERSION = 3
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


@dataclasses.dataclass(frozen=True)
class Part:
    """One tar's finished scan: its rows lie in `file`, the rest is here."""

    tar: Place
    file: Path
    num_bytes: int
    sha256: str | None
    rows_digest: str
    num_samples: int
    num_labelled: int
    max_label: int
    bad_labels: int
    num_annotated: dict[str, int]
    bad_annotations: dict[str, int]
    first_bad: list[dict]  # of the annotations
    rejected: list[dict]
    tag: str | None = None  # of a remote tar, where it takes the place of the sha256

    @property
    def content(self) -> str:
        """What changes with the tar."""
        return self.sha256 or f"{self.num_bytes} {self.tag}"


def name(tar: Place, max_pixels: int, verify: bool, retry_s: float) -> str:
    """A name that changes with the tar and with how it is scanned."""
    try:
        if isinstance(tar, str):
            found = transfer.opened(tar, retry_s)
            state = [found.size, found.tag]
        else:
            stat = tar.stat()
            state = [stat.st_size, stat.st_mtime_ns]
    except (OSError, transfer.RefusedError):  # the scan says so
        state = []
    return digest(json.dumps([VERSION, str(tar), state, max_pixels, verify]))


def write(scan: tars.Scan, file: Path) -> None:
    columns = list(zip(*scan.rows, strict=True)) or [[] for _ in COLUMNS]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, COLUMNS, strict=True)]
    column = dict(zip(PART_SCHEMA.names, columns, strict=True))
    labels, bad = column["label"], scan.bad_annotations
    meta = {
        "num_bytes": scan.num_bytes,
        "sha256": scan.sha256,
        "tag": scan.tag,
        "rows_digest": digest(json.dumps(scan.rows)),
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


def read(tar: Place, file: Path) -> Part | None:
    """None where there is no such part or it is unreadable."""
    try:
        found = pq.read_metadata(file)
        meta = json.loads((found.metadata or {})[META])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return None
    return Part(tar=tar, file=file, num_samples=found.num_rows, **meta)


def merge(parts: Sequence[Part], file: Path, fingerprint: str) -> None:
    """A row group per tar; one tar's rows in memory at a time."""
    schema = INDEX_SCHEMA.with_metadata({META: json.dumps({"version": VERSION, "fingerprint": fingerprint}).encode()})
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for shard, part in enumerate(parts):
            table = pq.read_table(part.file, schema=PART_SCHEMA)
            column = pa.array([shard], pa.int32()).take(pa.array([0] * table.num_rows, pa.int32()))
            rows = pa.Table.from_arrays([column, *table.columns], schema=schema)
            writer.write_table(rows, row_group_size=max(1, table.num_rows))


def described(parts: Sequence[Part], place: Place) -> dict[str, Any]:
    """What dataset.json in `place` says of the tars' scans."""
    rejected = [line for part in parts for line in part.rejected]
    reasons = collections.Counter(line["kind"] for line in rejected)
    return {
        "samples": sum(part.num_samples for part in parts),
        "labelled": sum(part.num_labelled for part in parts),
        "bad_labels": sum(part.bad_labels for part in parts),
        "annotated": {kind: sum(part.num_annotated[kind] for part in parts) for kind in annotations.KINDS},
        "bad_annotations": {kind: sum(part.bad_annotations[kind] for part in parts) for kind in annotations.KINDS},
        "rejected": {
            "count": len(rejected),
            "by_reason": dict(reasons.most_common()),
            "first": rejected[:FIRST_NAMED],
        },
        "shards": [_shard(part, place) for part in parts if part.num_samples],
    }


def _shard(part: Part, place: Place) -> dict[str, Any]:
    """A tar in dataset.json, its path relative where it lies under the index, so that the folder can be moved."""
    tar = part.tar
    if isinstance(tar, str):
        path = tar.removeprefix(f"{place}/")
    else:
        path = tar.relative_to(place).as_posix() if tar.is_relative_to(place) else str(tar)
    remote = {"etag": part.tag} if part.sha256 is None else {}
    return {"path": path, "bytes": part.num_bytes, "sha256": part.sha256, "samples": part.num_samples, **remote}


def log_left_out(title: str, found: Mapping[str, Any], first_bad: Sequence[dict[str, Any]], file: str) -> None:
    """What is left out of what was `described`; `file` names all of it. first_bad: annotations that are of no use."""
    rejected = found["rejected"]
    for line in rejected["first"]:
        what = (line["key"] or "all", line["offset"], line["shard"], line["reason"])
        log.warning("%s: left out %s at byte %d of %s: %s", title, *what)
    if rejected["count"] > FIRST_NAMED:
        log.warning("%s: left out %d in all; %s names each", title, rejected["count"], file)
    if num := found["bad_labels"]:
        log.warning("%s: %d samples have a .cls that is no class number: they count as unlabelled", title, num)
    for line in first_bad[:FIRST_NAMED]:
        what = (line["key"], line["shard"], line["kind"], line["reason"])
        log.warning("%s: kept %s of %s without its %s: %s", title, *what)
    for kind, num in found["bad_annotations"].items():
        if num:
            log.warning("%s: %d samples are kept without their .%s", title, num, annotations.MEMBERS[kind])


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
