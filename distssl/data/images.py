"""What an encoded image says about itself in its header: format, height, width, without decoding it.

Height and width are those of the upright image, after EXIF orientation, as DALI's decoders and `fn.peek_image_shape`
give them. Parsed here rather than with PIL because an index reads 10^8 headers: this takes microseconds, knows no
decompression-bomb state, and fails in one way only.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any, Protocol

SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "jp2")  # of a tar's image member, best first
EXIF_ORIENTATION = 0x0112
TIFF_WIDTH, TIFF_HEIGHT = 256, 257


class ImageError(ValueError):
    """These bytes are no image that can be trained on; the message says why."""


class Encoded(Protocol):
    """An encoded image: bytes, or what fetches those that are looked at."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: Any, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Header:
    """`suffix` is the one a file of this format should have; `height`, `width` in pixels, upright."""

    suffix: str
    height: int
    width: int


def read_header(data: Encoded) -> Header:
    """Format and size of an encoded image. Raises ImageError for anything that is not one of our formats."""
    suffix = sniff(data)
    try:
        height, width, orientation = _PARSERS[suffix](data)
    except (struct.error, IndexError) as error:
        raise ImageError(f"{suffix} header is cut or damaged") from error
    if height <= 0 or width <= 0:
        raise ImageError(f"{suffix} header says {width}x{height} pixels")
    if orientation >= 5:  # 5 to 8 turn by a quarter
        height, width = width, height
    return Header(suffix, height, width)


def sniff(encoded: Encoded) -> str:
    """The format by its magic bytes (16 are enough), as a suffix. Raises ImageError where it is none of ours."""
    if not len(encoded):
        raise ImageError("zero bytes")
    data: bytes = encoded[:512]
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tif"
    if data[:12] == b"\0\0\0\x0cjP  \r\n\x87\n" or data[:4] == b"\xff\x4f\xff\x51":
        return "jp2"
    if data[:2] == b"BM" and data[6:10] == bytes(4):
        return "bmp"
    raise ImageError(_stranger(data))


def _unpack(form: str, data: Encoded, at: int) -> tuple[Any, ...]:
    return struct.unpack(form, data[at : at + struct.calcsize(form)])


def _stranger(data: bytes) -> str:
    if data[:4] == b"GIF8":
        return "GIF is not supported"
    if data[4:8] == b"ftyp":
        return f"{data[8:12].decode('latin1').strip().upper()} (ISO media) is not supported"
    if data.lstrip()[:1] == b"<":
        return "markup (HTML or XML), not an image"
    return f"not an image (starts with {data[:8].hex(' ')})"


def _jpeg(data: Encoded) -> tuple[int, int, int]:
    orientation, at = 1, 2
    while True:
        while data[at] != 0xFF:  # some writers pad between segments
            at += 1
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # stand alone, without a length
            continue
        if marker in (0xD9, 0xDA):
            raise ImageError("jpg has no frame header")
        (length,) = _unpack(">H", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = _unpack(">HH", data, at + 3)
            return height, width, orientation
        if marker == 0xE1 and data[at + 2 : at + 8] == b"Exif\0\0":
            orientation = _exif_orientation(data[at + 8 : at + length])
        at += length


def _png(data: Encoded) -> tuple[int, int, int]:
    if data[12:16] != b"IHDR":
        raise ImageError("png has no IHDR")
    width, height = _unpack(">II", data, 16)
    orientation, at = 1, 8
    while at + 8 <= len(data):
        (length,) = _unpack(">I", data, at)
        if data[at + 4 : at + 8] == b"eXIf":
            orientation = _exif_orientation(data[at + 8 : at + 8 + length])
            break
        at += length + 12
    return height, width, orientation


def _webp(data: Encoded) -> tuple[int, int, int]:
    kind = data[12:16]
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise ImageError("webp has no key frame")
        width, height = _unpack("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF, 1
    if kind == b"VP8L":
        (bits,) = _unpack("<I", data, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, 1
    if kind != b"VP8X":
        raise ImageError(f"webp begins with an unknown chunk {kind!r}")
    width = int.from_bytes(data[24:27], "little") + 1
    height = int.from_bytes(data[27:30], "little") + 1
    orientation, at = 1, 12
    while at + 8 <= len(data):
        (length,) = _unpack("<I", data, at + 4)
        if data[at : at + 4] == b"EXIF":
            orientation = _exif_orientation(data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0"))
            break
        at += 8 + length + length % 2
    return height, width, orientation


def _bmp(data: Encoded) -> tuple[int, int, int]:
    (header_size,) = _unpack("<I", data, 14)
    width, height = _unpack("<HH" if header_size == 12 else "<ii", data, 18)
    return abs(height), width, 1  # a negative height means top-down rows


def _tiff(data: Encoded) -> tuple[int, int, int]:
    tags = _tiff_tags(data)
    if TIFF_WIDTH not in tags or TIFF_HEIGHT not in tags:
        raise ImageError("tif has no size in its first directory")
    orientation = tags.get(EXIF_ORIENTATION, 1)
    return tags[TIFF_HEIGHT], tags[TIFF_WIDTH], orientation if 1 <= orientation <= 8 else 1


def _jp2(data: Encoded) -> tuple[int, int, int]:
    if data[:2] == b"\xff\x4f":  # a bare codestream: the SIZ segment holds the reference grid and its offset
        right, bottom, left, top = _unpack(">IIII", data, 8)
        return bottom - top, right - left, 1
    at = 12
    while True:
        length, kind = _unpack(">I4s", data, at)
        if kind == b"jp2h":
            at += 8  # go into the box: ihdr is its first child
        elif kind == b"ihdr":
            height, width = _unpack(">II", data, at + 8)
            return height, width, 1
        elif length < 8:
            raise ImageError("jp2 has no image header box")
        else:
            at += length


def _exif_orientation(block: bytes) -> int:
    """1 (upright) where the block is damaged: then DALI ignores it too."""
    try:
        orientation = _tiff_tags(block).get(EXIF_ORIENTATION, 1)
    except (struct.error, IndexError, ImageError):
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _tiff_tags(data: Encoded) -> dict[int, int]:
    """The integer tags of the first directory of a TIFF or BigTIFF block (EXIF is one)."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise ImageError("tif has no byte order")
    (version,) = _unpack(order + "H", data, 2)
    big = version == 43
    (at,) = _unpack(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = _unpack(order + ("Q" if big else "H"), data, at)
    at += 8 if big else 2
    tags: dict[int, int] = {}
    for _ in range(min(count, 4096)):
        tag, kind = _unpack(order + "HH", data, at)
        if kind in (3, 4):  # SHORT and LONG: their first value lies in the entry itself
            (tags[tag],) = _unpack(order + ("H" if kind == 3 else "I"), data, at + (12 if big else 8))
        at += 20 if big else 12
    return tags


_PARSERS = {"jpg": _jpeg, "png": _png, "webp": _webp, "bmp": _bmp, "tif": _tiff, "jp2": _jp2}
