"""Square patches of one image: cut in the graph, handed over as one picture, apart again in torch."""

# DALI's type stubs lack its enums and know no pipeline without a GPU.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from nvidia.dali import fn, math, types

from distssl.data import augment
from distssl.data.draws import Draws
from distssl.data.sample import Sample


def random_square(sample: Sample, resize_px: tuple[int, int], size_px: int) -> Any:
    """A square at a random place of the image, its short side resized to a random length of a range first."""
    draws = sample.draws
    image = fn.resize(sample.whole(), resize_shorter=draws.uniform(*resize_px), antialias=True)
    return augment.square(image, size_px, draws.unit(), draws.unit())


def down_and_up(patch: Any, draws: Draws, probability: float, smallest_px: float, size_px: int) -> Any:
    """Sample a square patch down, to a side that is log-uniform from smallest_px on, and up again, linearly."""
    chosen = draws.coin(probability)
    side_px = math.floor(draws.log_uniform(smallest_px, size_px) + 0.5)  # DALI cuts the image where it is fractional
    if chosen:
        patch = fn.resize(patch, size=fn.stack(side_px, side_px), antialias=True)
        patch = fn.resize(patch, size=(size_px, size_px))
    return patch


def stack(image: Any, corners: Sequence[tuple[Any, Any]], size_px: int) -> Any:
    """Patches one below the other, [P * size_px, size_px, C]. corners: top and left of each, int32 scalars, inside."""
    return below(*(cut(image, top, left, size_px) for top, left in corners))


def below(*patches: Any) -> Any:
    """Images of the same width one below the other."""
    return fn.cat(*patches, axis=0)


def cut(image: Any, top: Any, left: Any, size_px: int) -> Any:
    """A patch, [size_px, size_px, C]."""
    anchor = fn.stack(fn.cast(top, dtype=types.INT32), fn.cast(left, dtype=types.INT32))
    return fn.slice(image, anchor, [size_px, size_px], axes=[0, 1])


def vector(scalars: Iterable[Any]) -> Any:
    """Scalars of the graph as one output [n]."""
    return fn.stack(*scalars)


def unstack(stacked: torch.Tensor, num: int) -> torch.Tensor:
    """[N, C, P * t, t] as the graph hands it over -> [N, P, C, t, t], without a copy."""
    return stacked.unflatten(2, (num, -1)).transpose(1, 2)


def laid_out(tiles: torch.Tensor, grid: int) -> torch.Tensor:
    """[N, grid**2, C, t, t] -> [N, C, H, W], row by row with a gap of two pixels."""
    framed = F.pad(tiles, (1, 1, 1, 1)).unflatten(1, (grid, grid))  # [N, rows, columns, C, t + 2, t + 2]
    return framed.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
