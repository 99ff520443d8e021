"""What there is to pack: a folder, a zip, a CSV, a torchvision data set or the built-in digits, all as one `Source`."""

from __future__ import annotations

import csv
import dataclasses
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from distssl.data import catalogue, digits, images
from distssl.errors import ConfigError

log = logging.getLogger(__name__)

PATH_COLUMNS = ("path", "image", "file", "filename", "filepath", "image_path", "image_file")
LABEL_COLUMNS = ("label", "class", "category", "target")
DIGITS = "scattered_digits"
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)
SHOWN = 20  # lines about files left out, before a count has to do


@dataclasses.dataclass(frozen=True)
class Source:
    """N items that may become samples, read one at a time.

    `names` are unique and "/"-separated; `stamps` change when an item's content does; `sizes` are bytes, estimated
    where items are encoded on the way. `read(i)` gives the encoded image and its class number, -1 for none, and
    raises images.ImageError where there is nothing to read.
    """

    title: str
    names: Sequence[str]
    stamps: Sequence[str]
    sizes: Sequence[int]
    classes: tuple[str, ...]
    read: Callable[[int], tuple[bytes, int]]


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
    path = Path(source).expanduser()
    name, _, split = source.partition(":")
    if path.is_dir():
        return "folder", path
    if path.is_file():
        if zipfile.is_zipfile(path):
            return "zip", path
        if path.suffix.lower() in (".csv", ".tsv"):
            return "csv", path
        raise ConfigError(f"{key}={source}: is a file, but no zip, CSV or tar; give one of those or a folder")
    if name.lower() == DIGITS:
        if split not in ("", "train", "test"):
            raise ConfigError(f"{key}={source}: no such split; there is {DIGITS}:train and {DIGITS}:test")
        return "digits", path
    if catalogue.find(name) is not None:
        return "torchvision", path
    if os.sep in source or path.suffix:
        raise ConfigError(f"{key}={source}: does not exist; give a folder, zip, CSV, tars or the name of a data set")
    raise ConfigError(f"{key}={source}: neither a path nor a data set. {catalogue.suggestion(name, [DIGITS])}")


def identity(source: str, *, key: str = "source") -> str:
    """A string that changes when the source does; cheap: files are listed, none is read and nothing is downloaded."""
    kind, path = recognise(source, key=key)
    if kind == "digits":
        return f"{source.lower()} {digits.DESCRIPTION}"
    if kind == "torchvision":
        return source.lower()
    files = _walk(path) if kind == "folder" else [(path, path.name)]
    return "\n".join([str(path.resolve()), *(f"{name} {_stamp(file.stat())}" for file, name in files if file.exists())])


def label_by_folder(names: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """Class numbers and names: the folder is the class iff every image lies in exactly one and there are several."""
    parts = [PurePosixPath(name).parts for name in names]
    classes = sorted({part[0] for part in parts})
    if any(len(part) != 2 for part in parts) or len(classes) < 2:
        return [-1] * len(names), ()
    number = {name: i for i, name in enumerate(classes)}
    return [number[part[0]] for part in parts], tuple(classes)


class LeftOut:
    """Names what is left out, one log line each, and counts where the lines become too many."""

    def __init__(self, title: str) -> None:
        self.title, self.count = title, 0

    def add(self, name: str, reason: str) -> None:
        self.count += 1
        if self.count <= SHOWN:
            log.warning("%s: left out %r: %s", self.title, name, reason)

    def close(self) -> None:
        if self.count > SHOWN:
            log.warning("%s: left out %d files in all; the first %d are named above", self.title, self.count, SHOWN)


def _folder(root: Path, title: str) -> Source:
    left_out = LeftOut(title)
    files: list[tuple[Path, str, os.stat_result]] = []
    for path, name in _walk(root):
        try:
            if not _may_be_image(name):
                with open(path, "rb") as file:
                    images.sniff(file.read(16))
            files.append((path, name, path.stat()))
        except (images.ImageError, OSError) as error:
            left_out.add(name, getattr(error, "strerror", None) or str(error))
    left_out.close()
    names = [name for _, name, _ in files]
    labels, classes = label_by_folder(names)
    return Source(
        title=title,
        names=names,
        stamps=[_stamp(stat) for _, _, stat in files],
        sizes=[stat.st_size for _, _, stat in files],
        classes=classes,
        read=lambda i: (_read_file(files[i][0]), labels[i]),
    )


def _zip(path: Path, title: str) -> Source:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{title}: is a damaged zip: {error}") from error
    left_out = LeftOut(title)
    entries: list[zipfile.ZipInfo] = []
    for entry in archive.infolist():
        if entry.is_dir() or _is_hidden(entry.filename):
            continue
        if entry.flag_bits & 1:
            raise ConfigError(f"{title}: is encrypted; unpack it and give the folder")
        try:
            if not _may_be_image(entry.filename):
                with archive.open(entry) as file:
                    images.sniff(file.read(16))
            entries.append(entry)
        except (images.ImageError, *DAMAGED_ZIP) as error:
            left_out.add(entry.filename, str(error))
    left_out.close()
    entries = sorted({entry.filename: entry for entry in entries}.values(), key=lambda entry: entry.filename)
    names = _without_common_top([entry.filename for entry in entries])
    labels, classes = label_by_folder(names)

    def read(i: int) -> tuple[bytes, int]:
        try:
            return archive.read(entries[i]), labels[i]
        except DAMAGED_ZIP as error:
            raise images.ImageError(f"damaged in the zip: {error}") from error

    return Source(
        title=title,
        names=names,
        stamps=[f"{entry.file_size}:{entry.CRC}" for entry in entries],
        sizes=[entry.file_size for entry in entries],
        classes=classes,
        read=read,
    )


def _csv(path: Path, title: str) -> Source:
    rows = _csv_rows(path, title)
    left_out = LeftOut(title)
    kept: dict[str, tuple[Path, str, os.stat_result]] = {}
    for name, label in rows:
        file = path.parent / name
        try:
            stat = file.stat()
        except OSError as error:
            left_out.add(name, error.strerror or str(error))
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
    files = list(kept.values())
    return Source(
        title=title,
        names=list(kept),
        stamps=[f"{_stamp(stat)}:{label}" for _, label, stat in files],
        sizes=[stat.st_size for _, _, stat in files],
        classes=classes,
        read=lambda i: (_read_file(files[i][0]), classes.index(files[i][1]) if files[i][1] else -1),
    )


def _csv_rows(path: Path, title: str) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{title}: is not UTF-8 text; save it as UTF-8") from error
    first = text.partition("\n")[0]
    reader = csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=first.count))
    columns = {name.strip().lower(): name for name in reader.fieldnames or [] if name}
    at = next((columns[name] for name in PATH_COLUMNS if name in columns), None)
    label = next((columns[name] for name in LABEL_COLUMNS if name in columns), None)
    if at is None:
        raise ConfigError(f"{title}: no path column among {', '.join(columns)!r}; name it one of {PATH_COLUMNS}")
    return [(row[at].strip(), ((row[label] or "") if label else "").strip()) for row in reader if row[at]]


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


def _walk(root: Path) -> list[tuple[Path, str]]:
    """(path, name from the root) of every file that is not hidden, by name; links are followed, loops are not."""
    files: list[tuple[Path, str]] = []
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        log.warning("left out the folder %s: %s", error.filename, error.strerror)

    for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        stat = Path(folder).stat()
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        here = Path(folder).relative_to(root)
        files += [(Path(folder, name), (here / name).as_posix()) for name in names if not _is_hidden(name)]
    return sorted(files, key=lambda file: file[1])


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in ("__MACOSX", "Thumbs.db") for part in name.split("/"))


def _may_be_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower().removeprefix(".") in images.SUFFIXES


def _without_common_top(names: list[str]) -> list[str]:
    tops = {name.partition("/")[0] for name in names}
    if len(tops) != 1 or not all("/" in name for name in names):
        return names
    return [name.partition("/")[2] for name in names]


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise images.ImageError(f"cannot be read: {error.strerror}") from error
