"""One WebDataset tar, read member by member: where each sample's image lies, its size in pixels, its label,
where its annotations lie.

Samples are grouped as webdataset does it: the key is a member's path up to the first dot of its basename, consecutive
members with one key are one sample. Nothing in a tar is fatal: what cannot be used is named in `Scan.rejected`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from distssl.data import annotations, images, locations, ranged, transfer
from distssl.data.locations import Place

if TYPE_CHECKING:
    from distssl.data.probe import Probe  # imports DALI, which only `verify` needs

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
MAX_IMAGE_BYTES = 1 << 30
VERIFIED_WINDOW = 8 << 20  # bytes a request where all of a remote tar is read
NUM_CLASSES_LIMIT = 1 << 20  # a label above this is an id of something, not a class
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")  # webdataset leaves these out too


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A member, a sample or (key "") the whole tar that is left out. `kind` is the reason without its numbers."""

    shard: str
    offset: int
    key: str
    kind: str
    reason: str


@dataclasses.dataclass
class Scan:
    """One tar's samples, in tar order: (key, offset, size, height, width, label) and, in the order of
    annotations.KINDS, (offset, size) of each kind.

    Offsets and sizes in bytes; a sample without an annotation has size 0 for it.
    """

    rows: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    rejected: list[Rejected] = dataclasses.field(default_factory=list)
    bad_labels: int = 0  # samples kept without their label because it is no class number
    bad_annotations: list[Rejected] = dataclasses.field(default_factory=list)  # left out of samples kept; kind: theirs
    num_bytes: int = 0
    sha256: str | None = ""  # None: remote, where it would take to read all of it
    tag: str | None = None  # of a remote tar: its ETag, or what else changes with it


def scan(
    tar: Place,
    *,
    max_pixels: int,
    probe: Probe | None = None,
    retry_s: float = transfer.RETRY_S,
    stop: threading.Event | None = None,
) -> Scan:
    """Everything an index needs of one tar, of a remote one by ranged reads of headers alone, if nothing is probed.

    Never raises for what is in the file or for a file that cannot be read; but RunError for a store that does not
    answer for `retry_s` seconds, and StoppedError on `stop`.
    """
    result = Scan()
    name = locations.name(tar)
    try:
        with _opened(tar, retry_s, probe is not None, stop) as file:
            compression = COMPRESSED.get(file.read(2))
            if compression and not _has_tar_magic(file):
                reason = f"{compression}-compressed: decompress it"
                result.rejected.append(Rejected(name, 0, "", reason, reason))
                return result
            if isinstance(file, ranged.RangedFile):
                result.sha256, result.num_bytes, result.tag = None, file.size, file.tag
            else:
                result.sha256, result.num_bytes = _digest(file)
            _Scanner(file, name, result, max_pixels, probe).run()
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
        return Scan(rejected=[Rejected(name, 0, "", reason, reason)])
    except transfer.RefusedError as error:
        return Scan(rejected=[Rejected(name, 0, "", "cannot be read", f"cannot be read: {error}")])
    return result


@contextmanager
def _opened(
    tar: Place, retry_s: float, verify: bool, stop: threading.Event | None
) -> Iterator[BinaryIO | ranged.RangedFile]:
    if isinstance(tar, str):
        yield ranged.RangedFile(tar, retry_s, VERIFIED_WINDOW if verify else ranged.WINDOW, stop)
    else:
        with open(tar, "rb") as file:
            yield file


def _has_tar_magic(file: BinaryIO | ranged.RangedFile) -> bool:
    """A member's name may begin like a compressed file; a tar has its own magic further on."""
    file.seek(257)
    return file.read(5) == b"ustar"


class _Scanner:
    def __init__(
        self, file: BinaryIO | ranged.RangedFile, shard: str, result: Scan, max_pixels: int, probe: Probe | None
    ) -> None:
        self.file, self.shard, self.result = file, shard, result
        self.max_pixels, self.probe = max_pixels, probe
        self.seen: set[str] = set()

    def run(self) -> None:
        key: str | None = None
        sample: dict[str, tarfile.TarInfo] = {}
        for member in self._members():
            match = _NAME.match(member.name)
            if match is None or _META.match(member.name):
                continue
            prefix, suffix = match.group(1), match.group(2).lower()
            if prefix != key:
                self._finish(key, sample)
                key, sample = prefix, {}
            if suffix in sample:
                self._reject(member.offset_data, prefix, "duplicate key")
            else:
                sample[suffix] = member
        self._finish(key, sample)
        if not self.result.rows and not self.result.rejected:
            self._reject(0, "", "no samples in this tar")

    def _members(self) -> Iterator[tarfile.TarInfo]:
        """Regular files that lie in the tar completely; ends at the tar's end or where it is cut or damaged."""
        self.file.seek(0)
        if self.result.num_bytes == 0:
            return
        try:
            tar = tarfile.TarFile(fileobj=cast(BinaryIO, self.file), encoding="utf-8", errors="surrogateescape")
        except (tarfile.TarError, ValueError, RecursionError) as error:
            self._reject(0, "", "not a tar", f"not a tar: {error}")
            return
        while True:
            try:
                member = tar.next()
            except RecursionError:
                reason = f"tar is damaged at byte {tar.offset}: headers of headers without end; they are left out"
                self._reject(tar.offset, "", "tar is damaged", reason)
                return
            except (tarfile.TarError, ValueError, OverflowError) as error:
                self._reject(tar.offset, "", "tar is cut", f"tar is cut at byte {self.result.num_bytes}: {error}")
                return
            if member is None:
                break
            tar.members = []  # type: ignore[attr-defined] # tarfile keeps every member, 1.5 kB each
            if member.offset_data + (member.size if member.isreg() else 0) > self.result.num_bytes:
                reason = f"tar is cut at byte {self.result.num_bytes}, inside {_printable(member.name)}"
                self._reject(member.offset_data, "", "tar is cut", reason)
                return
            if member.isreg() and not member.issparse():
                yield member
            elif (member.islnk() or member.issym() or member.issparse()) and _is_image_name(member.name):
                self._reject(member.offset_data, member.name, "a link or sparse member, without data of its own")
        self._check_end(tar.offset)

    def _check_end(self, at: int) -> None:
        """tarfile stops silently at a damaged header and at the end of the file; a whole tar ends in a zero block."""
        self.file.seek(at)
        block = self.file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            self._reject(at, "", "tar is cut", f"tar is cut at byte {self.result.num_bytes}: it has no end mark")
        elif block.strip(b"\0"):
            self._reject(at, "", "tar is damaged", f"tar is damaged at byte {at}: what follows is left out")

    def _finish(self, key: str | None, sample: dict[str, tarfile.TarInfo]) -> None:
        """Checks one sample and adds its row, or says why not."""
        if key is None:
            return
        suffix = next((suffix for suffix in images.SUFFIXES if suffix in sample), None)
        member = sample[suffix] if suffix else next(iter(sample.values()))
        if key in self.seen:
            self._reject(member.offset_data, key, "duplicate key")
            return
        self.seen.add(key)
        if suffix is None:
            self._reject(
                member.offset_data, key, "no image member", f"no image member, only {', '.join(sorted(sample))}"[:200]
            )
            return
        if member.size > MAX_IMAGE_BYTES:
            self._reject(
                member.offset_data, key, "too many bytes", f"{member.size} bytes is more than {MAX_IMAGE_BYTES}"
            )
            return
        data = self._read(member)
        try:
            header = images.read_header(data)
        except images.ImageError as error:
            self._reject(member.offset_data, key, "not a usable image", str(error))
            return
        if header.height * header.width > self.max_pixels:
            reason = f"{header.width}x{header.height} is more than max_pixels={self.max_pixels}"
            self._reject(member.offset_data, key, "more than max_pixels", reason)
            return
        problem = self.probe.problem(data[:]) if self.probe else None
        if problem is not None:
            self._reject(member.offset_data, key, "does not decode", f"does not decode: {problem}")
            return
        label = self._label(sample.get("cls"))
        place = (_printable(key), member.offset_data, member.size)
        found = [self._annotation(key, kind, sample, header) for kind in annotations.KINDS]
        self.result.rows.append((*place, header.height, header.width, label, *(at for place in found for at in place)))

    def _label(self, member: tarfile.TarInfo | None) -> int:
        if member is None:
            return -1
        text = self._read(member)[:].strip() if member.size < 64 else b""
        try:
            label = int(text)
        except ValueError:
            label = NUM_CLASSES_LIMIT
        if -1 <= label < NUM_CLASSES_LIMIT:
            return label
        self.result.bad_labels += 1
        return -1

    def _annotation(
        self, key: str, kind: str, sample: dict[str, tarfile.TarInfo], image: images.Header
    ) -> tuple[int, int]:
        """Offset and size of a sample's annotation, (0, 0) where there is none that can be used."""
        member = sample.get(annotations.MEMBERS[kind])
        if member is None:
            return 0, 0
        if member.size > annotations.MAX_BYTES:
            problem = f"{member.size} bytes is more than {annotations.MAX_BYTES}"
        else:
            problem = annotations.problem(kind, self._read(member), image.height, image.width)
        if problem is None:
            return member.offset_data, member.size
        bad = Rejected(self.shard, member.offset_data, _printable(key), kind, problem)
        self.result.bad_annotations.append(bad)
        return 0, 0

    def _read(self, member: tarfile.TarInfo) -> images.Encoded:
        if isinstance(self.file, ranged.RangedFile):
            return ranged.Span(self.file, member.offset_data, member.size)
        self.file.seek(member.offset_data)
        return self.file.read(member.size)

    def _reject(self, offset: int, key: str, kind: str, reason: str = "") -> None:
        self.result.rejected.append(Rejected(self.shard, offset, _printable(key), kind, reason or kind))


def _digest(file: BinaryIO) -> tuple[str, int]:
    """sha256 and number of bytes; also brings the file into the page cache for what follows."""
    file.seek(0)
    digest, num_bytes = hashlib.sha256(), 0
    while block := file.read(1 << 20):
        digest.update(block)
        num_bytes += len(block)
    return digest.hexdigest(), num_bytes


def _is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in images.SUFFIXES


def _printable(name: str) -> str:
    """A name that can be stored as UTF-8: tars may hold names in any encoding."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
