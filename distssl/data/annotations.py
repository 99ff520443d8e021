"""Annotations: what may lie beside an image in its sample, of four kinds, and what is wrong with one of no use.

    mask       KEY.mask.png        the class of each pixel: 8-bit grey, 255 for none
    depth      KEY.depth.png       of each pixel in millimetres: 16-bit grey, 0 where it is not known
    boxes      KEY.boxes.json      [{"label": int, "box": [x0, y0, x1, y1]}, ...] in pixels
    keypoints  KEY.keypoints.json  [[x, y, visible], ...] in pixels, visible 0 or 1

An index holds those that are whole; what only a task can tell, such as a box outside its image, is the task's to
refuse.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from distssl.data import images, store
from distssl.errors import RunError

LABEL = "label"  # a class for the whole image: a kind of label that is no annotation
KINDS = ("mask", "depth", "boxes", "keypoints")
MEMBERS = {"mask": "mask.png", "depth": "depth.png", "boxes": "boxes.json", "keypoints": "keypoints.json"}
NO_CLASS, NO_DEPTH = 255, 0  # of a pixel
MAX_BYTES = 1 << 30
FLOAT32_MAX = float(np.finfo(np.float32).max)  # boxes and points become float32, finite there too
_BITS = {"mask": 8, "depth": 16}
_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}  # PNG's colour types


class Indexed(store.Sharded, Protocol):
    """What `read` needs of a Dataset, which is made of an index and so stands above this module."""

    def rows(self, ids: np.ndarray, kinds: Sequence[str]) -> Any: ...


def kind_of(name: str) -> str | None:
    """The kind of annotation that a file of this name is, None for anything else."""
    return next((kind for kind in KINDS if name.lower().endswith(f".{MEMBERS[kind]}")), None)


def problem(kind: str, data: images.Encoded, height: int, width: int) -> str | None:
    """Why the bytes are no annotation of this kind for an image of so many pixels, upright; None where they are one."""
    if kind in _BITS:
        return _wrong_image(data, _BITS[kind], height, width)
    try:
        found = json.loads(data[:])
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(found, list):
        return f"not a list but {_shown(found)}"
    wrong = _wrong_box if kind == "boxes" else _wrong_point
    return next((f"{_shown(item)}: {what}" for item in found if (what := wrong(item))), None)


@functools.lru_cache(maxsize=16)
def blank(kind: str, height: int, width: int) -> bytes:
    """A mask in which no pixel has a class, or a depth map in which nothing is known."""
    from PIL import Image

    mode, fill = {"mask": ("L", NO_CLASS), "depth": ("I;16", NO_DEPTH)}[kind]
    file = io.BytesIO()
    Image.new(mode, (width, height), fill).save(file, "PNG")
    return file.getvalue()


def read(dataset: Indexed, ids: np.ndarray, kind: str) -> list[bytes | None]:
    """The annotations of int64 ids [N], in their order, None where there is none. Raises RunError for a cut shard."""
    return list(each(dataset, ids, kind))


def each(dataset: Indexed, ids: np.ndarray, kind: str) -> Iterator[bytes | None]:
    """As `read`, one at a time: all of a large dataset's masks are gigabytes."""
    rows = dataset.rows(ids, (kind,))
    offsets, sizes = rows.annotation_offset[kind].tolist(), rows.annotation_size[kind].tolist()
    opened = store.open_shards(dataset)
    opened.expect(rows.shard.tolist())
    try:
        for shard, offset, size in zip(rows.shard.tolist(), offsets, sizes, strict=True):
            try:
                data = opened.read(shard, offset, size) if size else None
            except OSError as error:
                raise RunError(f"{dataset.shard_paths[shard]}: cannot be read: {error}; index it again") from error
            yield data
    finally:
        opened.close()


def _wrong_image(data: images.Encoded, bits: int, height: int, width: int) -> str | None:
    try:
        header = images.read_header(data)
    except images.ImageError as error:
        return str(error)
    if header.suffix != "png":
        return f"{header.suffix}, not png"
    if (header.height, header.width) != (height, width):
        return f"{header.width}x{header.height} pixels where the image has {width}x{height}"
    # A decoder would turn a palette into brightness and 1 bit, or 8 where 16 are meant, into the full range.
    if data[24:26] != bytes((bits, 0)):
        found = f"{data[24]}-bit {_COLOURS.get(data[25], 'unknown')}" if len(data) > 25 else "cut"
        return f"{found} where {bits}-bit grey is right"
    return None


def _wrong_box(item: Any) -> str | None:
    if not isinstance(item, dict) or not {"label", "box"} <= item.keys():
        return 'not {"label": int, "box": [x0, y0, x1, y1]}'
    label, box = item["label"], item["box"]
    if not isinstance(label, int) or isinstance(label, bool) or not -(2**63) <= label < 2**63:
        return "label is no integer"
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        return "box is not four finite numbers"
    return None


def _wrong_point(item: Any) -> str | None:
    if not isinstance(item, list) or len(item) != 3 or not all(map(_is_finite, item)):
        return "not three finite numbers, x, y, visible"
    return None if item[2] in (0, 1) else "visible is neither 0 nor 1"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def _shown(item: Any) -> str:
    text = json.dumps(item, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:80]}..."
