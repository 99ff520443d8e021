"""Which images a task trains and tests on, how few labels are chosen, and annotations that are no images, checked."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distssl.data import annotations, draws, held_out
from distssl.data.shards import Dataset
from distssl.errors import ConfigError

MOST_MEASURED = 200  # depth maps looked at before the training
MOST_NAMED = 5  # mistakes in one message
OVERHANG_PX = 1.0  # of a box over the image's edge: annotation tools count pixels in several ways

LABEL = annotations.LABEL  # other kinds of labels are annotations.KINDS
WHERE = {
    LABEL: "class subfolders, a label column or .cls files",
    "mask": "KEY.mask.png beside each image",
    "depth": "KEY.depth.png beside each image",
    "boxes": "KEY.boxes.json beside each image",
    "keypoints": "KEY.keypoints.json beside each image",
}


@dataclass(frozen=True)
class Labelled:
    """Images with one kind of label, to train and to test on; name: of the data, in tables."""

    train: Dataset
    train_ids: np.ndarray  # int64, ascending
    test: Dataset
    test_ids: np.ndarray
    name: str

    @property
    def parts(self) -> tuple[tuple[Dataset, np.ndarray], ...]:
        """Both sets with their ids."""
        return (self.train, self.train_ids), (self.test, self.test_ids)


def has(dataset: Dataset, kind: str) -> bool:
    """Whether any image of it has such labels."""
    return bool(dataset.num_labelled if kind == LABEL else dataset.num_annotated[kind])


def find(train: Dataset, test: Dataset | None, kind: str, name: str, key: str = "eval.source") -> Labelled:
    """Without a test set of its own a fifth of the training set's labels is held out.

    key: of the training set. A test set's classes are the training set's by name, and get its numbers; some may be
    missing. Raises ConfigError where it has others, or where there are no labels of this kind.
    """
    if test is not None and kind == LABEL and test.classes != train.classes:
        others = sorted(set(test.classes) - set(train.classes))
        if others:
            raise ConfigError(
                f"eval.test_source: its classes are {_some(test.classes)}, those of the training images "
                f"{_some(train.classes)}; names of these are right, {others[0]} is none"
            )
        test = test.numbered_as(train.classes)
    ids = train.ids_with(kind)
    train_ids, test_ids = held_out.split(ids) if test is None else (ids, test.ids_with(kind))
    if not len(train_ids) or not len(test_ids):
        what = "labelled images" if kind == LABEL else f"images with {kind}"
        if test is None and len(ids):
            raise ConfigError(
                f"{key}: its {len(ids)} {what} are too few to hold a fifth out for the test; more of them, or an "
                "eval.test_source, are right"
            )
        raise ConfigError(f"{'eval.test_source' if len(ids) else key}: has no {what}; {WHERE[kind]} are right")
    return Labelled(train, train_ids, test or train, test_ids, name)


def _some(classes: Sequence[str]) -> str:
    return f"{len(classes)} ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def subset(ids: np.ndarray, num: int, seed: int) -> np.ndarray:
    """num of the ids by a hash of each, ascending; a smaller subset of one seed is part of a larger one."""
    return np.sort(ids[np.argsort(draws.hash64(held_out.SEED, seed, ids), kind="stable")[:num]])


def few(ids: np.ndarray, classes: np.ndarray, how_many: int | str | None, seed: int) -> np.ndarray:
    """The ids that a value of eval.labels chooses, ascending: a number, "1%" of them, "10/class", None for all.

    classes: int64 [N], of each id. A subset of one seed is part of a larger one of its kind.
    """
    if how_many is None:
        return ids
    if num := per_class(how_many):
        return np.sort(np.concatenate([subset(ids[classes == label], num, seed) for label in np.unique(classes)]))
    if isinstance(how_many, str):
        how_many = max(1, round(len(ids) * float(how_many.removesuffix("%")) / 100))
    return subset(ids, how_many, seed)


def per_class(how_many: int | str | None) -> int | None:
    """The 10 of "10/class"."""
    return int(how_many.removesuffix("/class")) if isinstance(how_many, str) and how_many.endswith("/class") else None


class Boxes(NamedTuple):
    """The boxes of an image: labels int64 [n], corners float32 [n, 4] as x0, y0, x1, y1 in its pixels."""

    labels: Tensor
    corners: Tensor


def boxes(dataset: Dataset, ids: np.ndarray) -> dict[int, Boxes]:
    """The boxes of images by id. Raises ConfigError for boxes outside their image, of no extent or below 0."""
    rows = dataset.rows(ids)
    sizes = dict(zip(ids.tolist(), zip(rows.height.tolist(), rows.width.tolist(), strict=True), strict=True))
    parsed = _parsed(dataset, ids, "boxes")
    found = {
        sample: Boxes(
            torch.tensor([box["label"] for box in given], dtype=torch.int64),
            torch.tensor([box["box"] for box in given], dtype=torch.float32).reshape(-1, 4),
        )
        for sample, given in parsed.items()
    }
    _refuse(dataset, found, lambda sample: _wrong_box(found[sample], *sizes[sample]))
    return found


def _wrong_box(boxes: Boxes, height: int, width: int) -> str | None:
    x0, y0, x1, y1 = boxes.corners.unbind(1)
    outside = (x0 < -OVERHANG_PX) | (y0 < -OVERHANG_PX) | (x1 > width + OVERHANG_PX) | (y1 > height + OVERHANG_PX)
    for wrong, what in (
        (outside, f"lies outside the image of {width}x{height}"),
        ((x1 <= x0) | (y1 <= y0), "has no extent"),
        (boxes.labels < 0, "has a label below 0"),
    ):
        if wrong.any():
            return f"box {boxes.corners[wrong][0].tolist()} {what}"
    return None


def keypoints(dataset: Dataset, ids: np.ndarray) -> dict[int, Tensor]:
    """The points of images by id: float32 [P, 3] as x, y in the image's pixels, and 1 where visible.

    Raises ConfigError where images have different numbers of points.
    """
    found = {
        sample: torch.tensor(given, dtype=torch.float32).reshape(-1, 3)
        for sample, given in _parsed(dataset, ids, "keypoints").items()
    }
    num = len(next(iter(found.values())))
    _refuse(dataset, found, lambda sample: _other_number(len(found[sample]), num))
    return found


def _other_number(num: int, right: int) -> str | None:
    if num == right:
        return None
    return f"has {num} keypoints, the first image {right}; as many in all of eval.source and eval.test_source are right"


def _parsed(dataset: Dataset, ids: np.ndarray, kind: str) -> dict[int, list]:
    """JSON annotations by id; the index has checked their shape."""
    read = annotations.read(dataset, ids, kind)
    return {sample: json.loads(data) for sample, data in zip(ids.tolist(), read, strict=True) if data is not None}


def _refuse(dataset: Dataset, samples: Iterable[int], wrong: Callable[[int], str | None]) -> None:
    """Raises ConfigError with a line for each sample with which something is wrong, the first few."""
    found = [(sample, problem) for sample in samples if (problem := wrong(sample))]
    if found:
        keys = dataset.keys(np.array([sample for sample, _ in found[:MOST_NAMED]]))
        lines = [f"{dataset.folder}: {key}: {problem}" for key, (_, problem) in zip(keys, found, strict=False)]
        more = [f"and {len(found) - MOST_NAMED} more"] if len(found) > MOST_NAMED else []
        raise ConfigError(*lines, *more)


def num_classes(data: Labelled, kind: str, asked: int | None) -> int:
    """`asked`, else one more than the largest class in the masks or boxes of the training and test images.

    Raises ConfigError where more than were asked for occur.
    """
    largest_in = _largest_in_mask if kind == "mask" else _largest_in_boxes
    most = 0
    for dataset, ids in data.parts:
        found = np.array([largest_in(given) if given else 0 for given in annotations.each(dataset, ids, kind)])
        most = max(most, 1 + int(found.max()))
        if asked is not None and most > asked:
            key = dataset.keys(ids[found.argmax(), None])[0]
            raise ConfigError(
                f"eval.num_classes={asked}: {dataset.folder}: {key}: has class {most - 1} in its {kind}; classes below "
                f"{asked} (255 is none), or at least eval.num_classes={most}, are right"
            )
    return asked or most


def mean_log_depth(dataset: Dataset, ids: np.ndarray) -> float:
    """The mean of the log of metres over the pixels whose depth is known, in MOST_MEASURED of the images."""
    logs = [_log_depths(data) for data in annotations.each(dataset, subset(ids, MOST_MEASURED, 0), "depth") if data]
    known = np.concatenate(logs)
    if not len(known):
        raise ConfigError("eval.source: no pixel of its depth maps has a known depth; millimetres above 0 are right")
    return float(known.mean())


def _log_depths(data: bytes) -> np.ndarray:
    metres = _pixels(data).astype(np.float64) / 1000
    return np.log(metres[metres > 0])


def _pixels(data: bytes) -> np.ndarray:
    """Of a PNG; none of one that is damaged, which the loader will name and leave out."""
    try:
        return np.asarray(Image.open(io.BytesIO(data)))
    except (OSError, SyntaxError):
        return np.zeros(0, np.uint8)


def num_points(data: Labelled) -> int:
    """Of each image. Raises ConfigError where there is none, or the test images have another number."""
    found = [len(keypoints(dataset, ids[:1])[int(ids[0])]) for dataset, ids in data.parts]
    if found[0] != found[1] or not found[0]:
        raise ConfigError(
            f"eval.source: {found[0]} keypoints an image, {found[1]} in the test images; as many, and one, are right"
        )
    return found[0]


def _largest_in_mask(data: bytes) -> int:
    values = _pixels(data)
    return int(values.max(initial=0, where=values != 255))


def _largest_in_boxes(data: bytes) -> int:
    return max((box["label"] for box in json.loads(data)), default=0)
