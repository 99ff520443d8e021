"""Files that may become samples: what is in a folder, what is hidden, which are images and which are their masks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from distssl.data import images

log = logging.getLogger(__name__)

T = TypeVar("T")

MASK = ".mask.png"  # of a mask's name
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


def may_be_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower().removeprefix(".") in images.SUFFIXES


def apart(files: list[T], name: Callable[[T], str], left_out: LeftOut) -> tuple[list[T], list[T | None]]:
    """The images among the files, and the mask of each: KEY.mask.png beside KEY.jpg, None where there is none."""
    masks = {name(file).lower().removesuffix(MASK): file for file in files if name(file).lower().endswith(MASK)}
    pictures = [file for file in files if not name(file).lower().endswith(MASK)]
    found = [masks.pop(str(PurePosixPath(name(file)).with_suffix("")).lower(), None) for file in pictures]
    for file in masks.values():
        left_out.add(name(file), "a mask without its image")
    return pictures, found


def without_common_top(names: list[str]) -> list[str]:
    tops = {name.partition("/")[0] for name in names}
    if len(tops) != 1 or not all("/" in name for name in names):
        return names
    return [name.partition("/")[2] for name in names]


def stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise images.ImageError(f"cannot be read: {error.strerror}") from error
