"""`pack`: a source becomes WebDataset tars and their index.

The items are laid in the order of a hash of their names, so every shard is a random sample of the source and the same
one wherever it is packed. The plan (which items, in which shard) is written first; a shard that is there under its name
is complete, so packing that was interrupted goes on with the next one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from webdataset import writer

from distssl import atomic
from distssl.data import annotations, files, images, indexing, sources
from distssl.errors import ConfigError

log = logging.getLogger(__name__)

SAMPLES_PER_SHARD = 10_000
SHARD_BYTES = 256 << 20
MIN_SHARDS, MIN_SAMPLES = 8, 8  # at least so many shards, unless one would have fewer samples than that
MEMBER_BYTES = 1024  # at most, for a member's header and padding

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """`order` holds item numbers; shard s takes `order[first[s]:first[s + 1]]`."""

    fingerprint: str
    order: list[int]
    first: list[int]
    keys: list[str]

    @property
    def num_shards(self) -> int:
        return len(self.first) - 1


def pack(
    source: str,
    out: Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    progress: Progress | None = None,
    key: str = "source",
) -> Path:
    """Packs a folder, zip, CSV, torchvision data set or `scattered_digits` into `out` and returns `out`.

    Image files are copied byte for byte; what is no image is named in the log and left out. `progress(done, total)`
    counts items. Downloads are kept in `downloads` beside `out`. Raises ConfigError: the source is not there, empty or
    holds no image; `out` holds something else; the disk is too small.
    """
    out = out.resolve()
    kind, path = sources.recognise(source, key=key)
    if kind == "folder" and out.is_relative_to(path.resolve()):
        raise ConfigError(f"out={out}: lies inside {key}={source}; give a folder outside it")
    opened = sources.open_source(source, out.parent / "downloads", key=key)
    plan = _plan(opened, samples_per_shard, shard_bytes, seed)
    atomic.make_folder(out)
    with atomic.locked(out):
        _claim(out, plan, opened)
        missing = [shard for shard in range(plan.num_shards) if not _shard_path(out, shard).exists()]
        ids = [i for shard in missing for i in plan.order[plan.first[shard] : plan.first[shard + 1]]]
        atomic.require_free(out, sum(opened.sizes[i] for i in ids) + 2 * MEMBER_BYTES * len(ids))
        left_out = files.LeftOut(opened.title)
        for shard in range(plan.num_shards):
            if shard in missing:
                _write_shard(opened, plan, shard, _shard_path(out, shard), left_out)
            if progress:
                progress(plan.first[shard + 1], len(plan.order))
        left_out.close()
        written = [path for shard in range(plan.num_shards) if (path := _shard_path(out, shard)).exists()]
        if not written:
            raise ConfigError(f"{key}={source}: none of its {len(plan.order)} files is an image that can be read")
        return indexing.index_locked(written, out, opened.title)


def _plan(source: sources.Source, samples_per_shard: int, shard_bytes: int, seed: int) -> Plan:
    n = len(source.names)
    if samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard={samples_per_shard}: at least 1")
    hashes = [hashlib.blake2b(f"{seed} {name}".encode("utf-8", "surrogateescape")).digest() for name in source.names]
    order = sorted(range(n), key=hashes.__getitem__)
    num_shards = max(
        -(-n // samples_per_shard),
        -(-sum(source.sizes) // shard_bytes),
        min(MIN_SHARDS, n // MIN_SAMPLES),
        1,
    )
    num_shards = min(num_shards, n)
    items = [[source.names[i], source.stamps[i]] for i in order]
    described = json.dumps([indexing.VERSION, seed, num_shards, source.classes, items])
    return Plan(
        fingerprint=hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest(),
        order=order,
        first=[n * shard // num_shards for shard in range(num_shards + 1)],
        keys=_keys(source.names),
    )


def _keys(names: Sequence[str]) -> list[str]:
    """Keys that webdataset takes apart as meant: no dot in the last part, no control character, all different."""
    keys: list[str] = []
    used: set[str] = set()
    for name in names:
        folder, slash, last = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").rpartition("/")
        stem = last.rpartition(".")[0] or last
        key = re.sub(r"[\x00-\x1f]", "_", folder + slash + stem.replace(".", "_"))
        if key.startswith("__"):
            key = "-" + key[1:]  # webdataset leaves out what is named __like_this__
        unique, n = key, 1
        while unique in used:
            n += 1
            unique = f"{key}-{n}"
        used.add(unique)
        keys.append(unique)
    return keys


def _claim(out: Path, plan: Plan, source: sources.Source) -> None:
    """Writes the plan into an empty `out`; goes on with the same plan; refuses anything else."""
    try:
        found = json.loads((out / indexing.PACKED).read_text(encoding="utf-8"))["plan"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        found = None
    if found == plan.fingerprint:
        return
    if any(path.name.endswith(".tar") for path in out.iterdir()) or (out / indexing.DATASET).exists():
        was = "of another source, or this one before it changed" if found else "that were not packed here"
        raise ConfigError(f"out={out}: holds shards {was}; give another folder, or delete this one first")
    text = {"plan": plan.fingerprint, "source": source.title, "items": len(plan.order), "classes": source.classes}
    with atomic.replacing(out / indexing.PACKED) as file:
        file.write_text(json.dumps(text, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_shard(source: sources.Source, plan: Plan, shard: int, path: Path, left_out: files.LeftOut) -> None:
    """One tar; none at all where every item of it is left out."""
    num_written = 0
    items = plan.order[plan.first[shard] : plan.first[shard + 1]]
    with (
        atomic.replacing(path) as temporary,
        open(temporary, "wb") as file,
        writer.TarWriter(file, encoder=False, mtime=0) as tar,
    ):
        for i in items:
            try:
                data, label = source.read(i)
                suffix = images.read_header(data).suffix
                found = source.read_annotations(i)
            except images.ImageError as error:
                left_out.add(source.names[i], str(error))
                continue
            sample = {"__key__": plan.keys[i], suffix: data}
            if label >= 0:
                sample["cls"] = str(label).encode()
            sample |= {annotations.MEMBERS[kind]: annotation for kind, annotation in found.items()}
            tar.write(sample)
            num_written += 1
    if not num_written:
        path.unlink()


def _shard_path(out: Path, shard: int) -> Path:
    return out / f"shard-{shard:06d}.tar"
