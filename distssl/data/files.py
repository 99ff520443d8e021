"""Files that may become samples: what is in a folder, what is hidden, which are images and which their annotations."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from distssl.data import annotations, images, locations

log = logging.getLogger(__name__)

T = TypeVar("T")

SHOWN = 20  # lines about files left out, before a count has to do


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


def walk(root: Path) -> list[tuple[Path, str]]:
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
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        here = Path(folder).relative_to(root)
        files += [(Path(folder, name), (here / name).as_posix()) for name in names if not is_hidden(name)]
    return sorted(files, key=lambda file: file[1])


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in ("__MACOSX", "Thumbs.db") for part in name.split("/"))


def may_be_sample(name: str) -> bool:
    """Whether the name is an image's or an annotation's."""
    return annotations.kind_of(name) is not None or may_be_image(name)


def may_be_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower().removeprefix(".") in images.SUFFIXES


def apart(files: list[T], name: Callable[[T], str], left_out: LeftOut) -> tuple[list[T], list[dict[str, T]]]:
    """The images among the files, and the annotations of each by kind: KEY.mask.png beside KEY.jpg."""
    pictures: list[T] = []
    beside: dict[tuple[str, str], T] = {}
    for file in files:
        kind = annotations.kind_of(name(file))
        if kind is None:
            pictures.append(file)
        else:
            beside[name(file).lower().removesuffix(f".{annotations.MEMBERS[kind]}"), kind] = file
    keys = [str(PurePosixPath(name(file)).with_suffix("")).lower() for file in pictures]
    found = [{kind: beside.pop((key, kind)) for kind in annotations.KINDS if (key, kind) in beside} for key in keys]
    for (_, kind), file in beside.items():
        left_out.add(name(file), f"{kind} without its image")
    return pictures, found


def without_common_top(names: list[str]) -> list[str]:
    tops = {name.partition("/")[0] for name in names}
    if len(tops) != 1 or not all("/" in name for name in names):
        return names
    return [name.partition("/")[2] for name in names]


def stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def read_file(path: Path) -> bytes:
    """Raises ImageError for a file that is gone or not ours to read, and ConfigError for another reason: that may pass,
    and no image is to be left out for it."""
    with locations.reading(str(path)):
        try:
            return path.read_bytes()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise images.ImageError(f"cannot be read: {error.strerror}") from error
