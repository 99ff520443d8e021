"""Images for tests, good and bad ones, and tars of them; also how to damage a tar that is indexed already."""

from __future__ import annotations

import functools
import io
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distssl.data.shards import Dataset


def pixels(number: int, size: tuple[int, int] = (60, 44)) -> np.ndarray:
    """A smooth coloured picture with a little noise, uint8 [H, W, 3], size (W, H); no two numbers look alike."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[: size[1], : size[0]] / max(size)
    waves = [np.sin(rng.uniform(3, 9) * x + rng.uniform(3, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
    return (127 + 110 * np.stack(waves, axis=2) + rng.normal(0, 3, (*y.shape, 3))).clip(0, 255).astype(np.uint8)


def encode(array: np.ndarray, name: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, name, **options)
    return file.getvalue()


def picture(number: int, name: str = "PNG", size: tuple[int, int] = (60, 44), **options: Any) -> bytes:
    return encode(pixels(number, size), name, **options)


def mixed(num: int) -> list[tuple[str, bytes]]:
    """Members of a tar: photos, real ones where there are any, as JPEG, PNG and WebP of many sizes up to 63 px."""
    rng = np.random.default_rng(0)
    kinds = [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")]
    real, members = real_photos(num), []
    for i in range(num):
        suffix, name = kinds[i % len(kinds)]
        width, height = (int(side) for side in rng.integers(30, 64, 2))
        array = np.asarray(real[i].resize((width, height))) if real else pixels(i, (width, height))
        members.append((f"photo{i:04d}.{suffix}", encode(array, name)))
    return members


def real(name: str) -> Path:
    """A file of real images, in DISTSSL_DATA or ../shared/data, where it is there."""
    return Path(os.environ.get("DISTSSL_DATA", Path(__file__).parents[2] / "shared" / "data")) / name


def real_photos(num: int) -> list[Image.Image]:
    """The first photos of clothing_cc0_s224.zip; [] where it is not there."""
    path = real("clothing_cc0_s224.zip")
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".jpg"))[:num]
        return [Image.open(io.BytesIO(file.read(name))).convert("RGB") for name in names]


def bomb(size_px: int = 30_000) -> bytes:
    """A small PNG that would unfold to size_px squared pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size_px, size_px, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + bytes(4000)


@functools.cache
def large_pictures() -> dict[str, bytes]:
    return {name: picture(7, name, (400, 300)) for name in ("JPEG", "PNG", "GIF")}


def bad(size: int) -> dict[str, tuple[bytes, str]]:
    """What may stand where an image of `size` bytes is expected, and a pattern of the reason it is refused for."""
    whole = large_pictures()
    assert all(len(data) > size for data in whole.values())
    kinds = {
        "zeros": (bytes(size), "not an image"),
        "garbage": (np.random.default_rng(0).bytes(size), "not an image"),
        "html": (b"<!DOCTYPE html><p>404</p>" * size, "markup"),
        "gif": (whole["GIF"], "GIF is not supported"),
        "avif": (b"\0\0\0\x1cftypavif" + bytes(size), "AVIF"),
        "cut_jpeg": (whole["JPEG"], "cannot be decoded"),
        "cut_png": (whole["PNG"], "cannot be decoded"),
        "bomb": (bomb(), "30000x30000 pixels are more than data.max_pixels="),
    }
    return {name: (data[:size].ljust(size, b"\0"), reason) for name, (data, reason) in kinds.items()}


def flipped(data: bytes, num: int = 100) -> bytes:
    """`data` with so many bytes behind its header changed."""
    rng = np.random.default_rng(1)
    damaged = bytearray(data)
    for at in rng.integers(len(data) // 2, len(data), num):
        damaged[at] ^= int(rng.integers(1, 256))
    return bytes(damaged)


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def overwrite(dataset: Dataset, sample: int, data: bytes) -> None:
    """Put `data` where the indexed image of a sample lies."""
    rows = dataset.rows(np.array([sample]))
    assert len(data) == rows.size[0]
    with open(dataset.shard_paths[int(rows.shard[0])], "r+b") as file:
        file.seek(int(rows.offset[0]))
        file.write(data)
