"""What there is to pack: a folder, a zip, a CSV, a torchvision data set or the built-in digits, all as one `Source`."""

from __future__ import annotations

import csv
import dataclasses
import errno
import lzma
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from distssl import atomic, stores
from distssl.data import catalogue, digits, files, images, locations
from distssl.errors import ConfigError

PATH_COLUMNS = ("path", "image", "file", "filename", "filepath", "image_path", "image_file")
LABEL_COLUMNS = ("label", "class", "category", "target")
DIGITS = "scattered_digits"
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Source:
    """N items that may become samples, read one at a time.

    `names` are unique and "/"-separated; `stamps` change when an item's content does; `sizes` are bytes, estimated
    where items are encoded on the way. `read(i)` gives the encoded image and its class number, -1 for none, and
    raises images.ImageError where there is nothing to read. `read_annotations(i)` gives the annotations that lie
    beside it, by kind, unchecked.
    """

    title: str
    names: Sequence[str]
    stamps: Sequence[str]
    sizes: Sequence[int]
    classes: tuple[str, ...]
    read: Callable[[int], tuple[bytes, int]]
    read_annotations: Callable[[int], dict[str, bytes]] = lambda _i: {}


def open_source(source: str, downloads: Path, *, key: str = "source") -> Source:
    """The source a string names. Raises ConfigError, saying what is possible, where there is none or no image in it."""
    kind, path = recognise(source, key=key)
    if kind == "folder":
        found = _folder(path, f"{key}={source}")
    elif kind == "zip":
        found = _zip(path, f"{key}={source}")
    elif kind == "csv":
        found = _csv(path, f"{key}={source}")
    elif kind == "digits":
        found = _digits(source.partition(":")[2] or "train")
    else:
        found = _from_catalogue(source, downloads, key)
    if not found.names:
        raise ConfigError(f"{key}={source}: holds no image ({', '.join(images.SUFFIXES)}); give a place that does")
    return found


def recognise(source: str, *, key: str = "source") -> tuple[str, Path]:
    """(kind, path): folder, zip, csv, digits or torchvision. Raises ConfigError for anything else."""
    path = stores.local(source)
    name, _, split = source.partition(":")
    with locations.reading(f"{key}={source}"):
        if path.is_dir():
            return "folder", path
        if path.is_file():
            return _kind_of_file(path, f"{key}={source}"), path
    if name.lower() == DIGITS:
        if split not in ("", "train", "test"):
            raise ConfigError(f"{key}={source}: no such split; there is {DIGITS}:train and {DIGITS}:test")
        return "digits", path
    if catalogue.find(name) is not None:
        return "torchvision", path
    if os.sep in source or path.suffix:
        raise ConfigError(f"{key}={source}: does not exist; give a folder, zip, CSV, tars or the name of a data set")
    raise ConfigError(f"{key}={source}: neither a path nor a data set. {catalogue.suggestion(name, [DIGITS])}")


def _kind_of_file(path: Path, title: str) -> str:
    with open(path, "rb") as file:  # by itself is_zipfile takes what cannot be read for no zip
        if zipfile.is_zipfile(file):
            return "zip"
    if path.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    raise ConfigError(f"{title}: is a file, but no zip, CSV or tar; give one of those or a folder")


def identity(source: str, *, key: str = "source") -> str:
    """A string that changes when the source does; cheap: files are listed, no image is read, nothing is downloaded.

    Raises ConfigError as `open_source` does for what is no source, and for a CSV that cannot be read.
    """
    kind, path = recognise(source, key=key)
    if kind == "digits":
        return f"{source.lower()} {digits.DESCRIPTION}"
    if kind == "torchvision":
        return source.lower()
    listed = files.walk(path) if kind == "folder" else [(path, path.name)]
    if kind == "csv":
        listed += [(path.parent / name, name) for name, _ in _csv_rows(path, f"{key}={source}")]
    return "\n".join([str(path.resolve()), *(f"{name} {stamp}" for file, name in listed if (stamp := _stamp(file)))])


def _stamp(file: Path) -> str | None:
    try:
        return files.stamp(file.stat())
    except (OSError, ValueError):  # `open_source` says so
        return None


def label_by_folder(names: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """Class numbers and names: the folder is the class iff every image lies in exactly one and there are several."""
    parts = [PurePosixPath(name).parts for name in names]
    classes = sorted({part[0] for part in parts})
    if any(len(part) != 2 for part in parts) or len(classes) < 2:
        return [-1] * len(names), ()
    number = {name: i for i, name in enumerate(classes)}
    return [number[part[0]] for part in parts], tuple(classes)


def _folder(root: Path, title: str) -> Source:
    left_out = files.LeftOut(title)
    listed: list[tuple[Path, str, os.stat_result]] = []
    for path, name in files.walk(root):
        try:
            if not files.may_be_sample(name):
                with open(path, "rb") as file:
                    images.sniff(file.read(16))
            listed.append((path, name, path.stat()))
        except (images.ImageError, OSError) as error:
            left_out.add(name, getattr(error, "strerror", None) or str(error))
    listed, beside = files.apart(listed, lambda file: file[1], left_out)
    left_out.close()
    names = [name for _, name, _ in listed]
    together = [{"": file, **found} for file, found in zip(listed, beside, strict=True)]
    labels, classes = label_by_folder(names)
    return Source(
        title=title,
        names=names,
        stamps=[" ".join(f"{kind}{files.stamp(file[2])}" for kind, file in sample.items()) for sample in together],
        sizes=[sum(file[2].st_size for file in sample.values()) for sample in together],
        classes=classes,
        read=lambda i: (files.read_file(listed[i][0]), labels[i]),
        read_annotations=lambda i: {kind: files.read_file(file[0]) for kind, file in beside[i].items()},
    )


def _zip(path: Path, title: str) -> Source:
    try:
        with _unzipping(title):
            archive = zipfile.ZipFile(path)
    except DAMAGED_ZIP as error:
        raise ConfigError(f"{title}: is a damaged zip: {error}") from error
    left_out = files.LeftOut(title)
    entries: list[zipfile.ZipInfo] = []
    for entry in archive.infolist():
        if not entry.filename or entry.is_dir() or files.is_hidden(entry.filename):
            continue
        if entry.flag_bits & 1:
            raise ConfigError(f"{title}: is encrypted; unpack it and give the folder")
        try:
            if not files.may_be_sample(entry.filename):
                with _unzipping(title), archive.open(entry) as file:
                    images.sniff(file.read(16))
            entries.append(entry)
        except (images.ImageError, *DAMAGED_ZIP) as error:
            left_out.add(entry.filename, str(error))
    entries = sorted({entry.filename: entry for entry in entries}.values(), key=lambda entry: entry.filename)
    entries, beside = files.apart(entries, lambda entry: entry.filename, left_out)
    left_out.close()
    together = [{"": entry, **found} for entry, found in zip(entries, beside, strict=True)]
    names = files.without_common_top([entry.filename for entry in entries])
    labels, classes = label_by_folder(names)

    def bytes_of(entry: zipfile.ZipInfo) -> bytes:
        try:
            with _unzipping(title):
                return archive.read(entry)
        except DAMAGED_ZIP as error:
            raise images.ImageError(f"damaged in the zip: {error}") from error

    return Source(
        title=title,
        names=names,
        stamps=[" ".join(f"{kind}{x.file_size}:{x.CRC}" for kind, x in sample.items()) for sample in together],
        sizes=[sum(entry.file_size for entry in sample.values()) for sample in together],
        classes=classes,
        read=lambda i: (bytes_of(entries[i]), labels[i]),
        read_annotations=lambda i: {kind: bytes_of(entry) for kind, entry in beside[i].items()},
    )


@contextmanager
def _unzipping(title: str) -> Iterator[None]:
    """Raises one of DAMAGED_ZIP for damage, also where bzip2 or a seek out of the file calls it an OSError, and
    ConfigError where the file cannot be read: that may pass, and no image is to be left out for it."""
    with locations.reading(title):
        try:
            yield
        except OSError as error:
            if error.errno not in (None, errno.EINVAL):
                raise
            raise zipfile.BadZipFile(str(error)) from error


def _csv(path: Path, title: str) -> Source:
    rows = _csv_rows(path, title)
    left_out = files.LeftOut(title)
    kept: dict[str, tuple[Path, str, os.stat_result]] = {}
    for name, label in rows:
        file = path.parent / name
        try:
            stat = file.stat()
        except (OSError, ValueError) as error:  # ValueError: no path has a NUL in it
            left_out.add(name, getattr(error, "strerror", None) or str(error))
            continue
        if name in kept:
            left_out.add(name, "listed before")
        else:
            kept[name] = (file, label, stat)
    left_out.close()
    if rows and not kept:
        raise ConfigError(f"{title}: none of its {len(rows)} paths exists; they count from {path.parent.resolve()}")
    found = {label for _, label, _ in kept.values() if label}
    numbers = all(label.isdecimal() for label in found)
    classes = tuple(sorted(found, key=lambda label: (int(label), label) if numbers else label))
    listed = list(kept.values())
    return Source(
        title=title,
        names=list(kept),
        stamps=[f"{files.stamp(stat)}:{label}" for _, label, stat in listed],
        sizes=[stat.st_size for _, _, stat in listed],
        classes=classes,
        read=lambda i: (files.read_file(listed[i][0]), classes.index(listed[i][1]) if listed[i][1] else -1),
    )


def _csv_rows(path: Path, title: str) -> list[tuple[str, str]]:
    try:
        with locations.reading(title):
            text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{title}: is not UTF-8 text; save it as UTF-8") from error
    lines = _csv_lines(text, title)
    columns = {name.strip().lower(): i for i, name in enumerate(next(lines, [])) if name}
    at = next((columns[name] for name in PATH_COLUMNS if name in columns), None)
    label = next((columns[name] for name in LABEL_COLUMNS if name in columns), None)
    if at is None:
        raise ConfigError(f"{title}: no path column among {', '.join(columns)!r}; name it one of {PATH_COLUMNS}")
    return [(name, _cell(line, label)) for line in lines if (name := _cell(line, at))]


def _cell(line: list[str], column: int | None) -> str:
    """What stands there; "" where the line ends before it."""
    return line[column].strip() if column is not None and column < len(line) else ""


def _csv_lines(text: str, title: str) -> Iterator[list[str]]:
    """The header and the rows. Raises ConfigError, with the line it begins in, for one that cannot be read."""
    first = text.partition("\n")[0]
    reader = csv.reader(text.splitlines(), delimiter=max(",;\t", key=first.count), strict=True)
    begin = 1
    try:
        for row in reader:
            yield row
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{title}: cannot be read from line {begin} on: {error}; close each quote") from error


def _digits(split: str) -> Source:
    pictures, labels = digits.scattered(split)
    return Source(
        title=f"{DIGITS}:{split}",
        names=[f"{split}-{i:05d}" for i in range(len(pictures))],
        stamps=[digits.DESCRIPTION] * len(pictures),
        sizes=[pictures[0].nbytes] * len(pictures),
        classes=tuple(str(i) for i in range(10)),
        read=lambda i: (digits.encode(pictures[i]), int(labels[i])),
    )


def _from_catalogue(source: str, downloads: Path, key: str) -> Source:
    atomic.make_folder(downloads)
    with atomic.locked(downloads):  # every rank of a host prepares, and torchvision writes where it reads
        data = catalogue.load(source, downloads, key=key)
    size = catalogue.mean_bytes(data)
    return Source(
        title=source,
        names=[f"{i:08d}" for i in range(len(data))],
        stamps=[""] * len(data),
        sizes=[size] * len(data),
        classes=tuple(str(name) for name in getattr(data, "classes", ())),
        read=lambda i: catalogue.item(data, i),
    )
