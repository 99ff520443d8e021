"""View graphs in tests: run one on a few images, and an image whose pixels say where they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distssl.data import graph
from tests import planted


def run(views: graph.Views, encoded: list[bytes], ids: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
    """The views of images with the ids 0, 1, ... or those given, on the CPU, in epoch 0 of seed 0."""
    n = len(encoded)
    feeds = iter([graph.Feed(0, np.arange(n) if ids is None else np.array(ids), np.full(n, -1), encoded)])
    device = torch.device("cpu")
    built = graph.Graph(views, lambda: next(feeds), seed=0, batch_size=n, threads=1, prefetch=1, device=device)
    return built.run()


def coordinates(side: int) -> bytes:
    """A square image of at most 256 px: red is the column, green the row."""
    y, x = np.mgrid[:side, :side]
    return planted.encode(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))
