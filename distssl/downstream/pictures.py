"""Pictures of an evaluation, in the run folder's `pictures`: nearest neighbours, clusters, what networks predict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import atomic
from distssl.context import Context
from distssl.downstream import features
from distssl.downstream.classify import nearest_of
from distssl.downstream.features import Extraction, Features
from distssl.downstream.fit import Fitting
from distssl.downstream.labels import Labelled
from distssl.downstream.task import unnormalised

FOLDER = "pictures"
PROJECTOR = "projector.npz"  # x float32 [n, D], labels int64 [n], thumbnails uint8 [n, 32, 32, 3], classes str [K]
NUM_QUERIES, NUM_NEIGHBOURS = 8, 7
NUM_CLUSTERS, NUM_OF_CLUSTER = 12, 8
NUM_PROJECTED, THUMBNAIL_PX = 500, 32
NUM_PREDICTED = 8


def neighbours(
    context: Context, data: Labelled, train: Features, test: Features, how: Extraction, backbone: str
) -> None:
    """A row a query of the test images, followed by its nearest training images; a green edge is of its class."""
    at = np.linspace(0, len(test) - 1, min(NUM_QUERIES, len(test))).astype(int)
    mean = train.mean()
    queries = torch.cat([test.block(i, i + 1) for i in at])
    _, nearest = nearest_of(F.normalize(queries - mean, dim=1), train, mean, NUM_NEIGHBOURS)  # [q, k]
    asked = features.crops(data.test, test.ids[at], how, context)
    found = features.crops(data.train, np.unique(train.ids[nearest.numpy()]), how, context)
    pictures = []
    for i, rows in zip(at.tolist(), nearest.tolist(), strict=True):
        pictures.append(_edged(asked.get(int(test.ids[i])), None, how))
        pictures += [_edged(found.get(int(train.ids[j])), bool(train.labels[j] == test.labels[i]), how) for j in rows]
    _save(_file(context, f"neighbours_{data.name}_{backbone}"), pictures, 1 + nearest.shape[1])


def clusters(
    context: Context, data: Labelled, found: np.ndarray, test: Features, how: Extraction, backbone: str
) -> None:
    """A row a cluster, the largest first; a green edge is of the class that is most frequent in the cluster."""
    sizes = np.bincount(found)
    chosen, commonest = [], []  # rows of the features, and the commonest class of the cluster of each
    for number in np.argsort(-sizes, kind="stable")[:NUM_CLUSTERS]:
        rows = np.flatnonzero(found == number)
        chosen += rows[np.linspace(0, len(rows) - 1, NUM_OF_CLUSTER).astype(int)].tolist()
        commonest += [np.bincount(test.labels[rows]).argmax()] * NUM_OF_CLUSTER
    images = features.crops(data.test, np.unique(test.ids[chosen]), how, context)
    pictures = [
        _edged(images.get(int(test.ids[i])), bool(test.labels[i] == label), how)
        for i, label in zip(chosen, commonest, strict=True)
    ]
    _save(_file(context, f"clusters_{data.name}_{backbone}"), pictures, NUM_OF_CLUSTER)


def projector(context: Context, data: Labelled, test: Features, how: Extraction) -> None:
    """Features of some test images, with their labels and thumbnails, for TensorBoard's projector."""
    at = np.linspace(0, len(test) - 1, min(NUM_PROJECTED, len(test))).astype(int)
    images = features.crops(data.test, test.ids[at], how, context)
    at = at[[int(i) in images for i in test.ids[at]]]
    if not len(at):
        return
    views = torch.stack([images[int(i)] for i in test.ids[at]])
    small = F.interpolate(views, (THUMBNAIL_PX, THUMBNAIL_PX), mode="area")
    path = _file(context, PROJECTOR, "")
    with atomic.locked(path.parent), atomic.replacing(path) as part, open(part, "wb") as file:
        np.savez_compressed(
            file,
            x=torch.cat([test.block(i, i + 1) for i in at]).numpy(),
            labels=test.labels[at],
            thumbnails=unnormalised(small).permute(0, 2, 3, 1).numpy(),
            classes=np.array(data.test.classes),
        )


def of_network(context: Context, fitting: Fitting, task: str, backbone: str, name: str) -> None:
    """What a network predicts for the first test images, beside the truth."""
    rows = fitting.picture(NUM_PREDICTED)
    if rows:
        _save(_file(context, f"{task}_{name}_{backbone}"), rows, 2 * fitting.network.pictures_an_image)


def _edged(image: Tensor | None, right: bool | None, how: Extraction) -> Tensor:
    """A normalised view [3, H, W] -> uint8 with an edge: green for right, red for wrong, grey for a query.

    Grey all over where there is no view: features are kept, and their image may be unreadable by now.
    """
    colour = {True: (0, 160, 0), False: (200, 0, 0), None: (128, 128, 128)}[right]
    image = torch.zeros(3, how.size_px, how.size_px) if image is None else image
    picture = unnormalised(image[None])[0]
    edge = max(1, picture.shape[1] // 32)
    framed = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand_as(picture).clone()
    framed[:, edge:-edge, edge:-edge] = picture[:, edge:-edge, edge:-edge]
    return framed


def _file(context: Context, name: str, suffix: str = ".png") -> Path:
    folder = context.run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    return folder / f"{name}{suffix}"


def _save(path: Path, pictures: list[Tensor], num_columns: int) -> None:
    """pictures: uint8 [3, H, W] each, row by row."""
    from PIL import Image
    from torchvision.utils import make_grid

    grid = make_grid(pictures, nrow=num_columns, padding=2, pad_value=255)
    with atomic.locked(path.parent), atomic.replacing(path) as part:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(part, "PNG")
