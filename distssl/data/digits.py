"""Scattered digits: the built-in data set, small enough for a laptop's demo and hard enough to need pretraining.

scikit-learn's 1,797 handwritten digits (8x8), each turned, scaled, coloured and laid somewhere on a textured colour
canvas, several times. On the plain digits a linear probe of the raw pixels is already right; here place, size and
colour say nothing about the class, and a network has to find the shape.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

SIZE_PX = 40
SCATTERINGS = {"train": 8, "test": 3}  # images made of each digit
TEST_DIGITS = 400  # digits, chosen by a fixed permutation, that no training image shows
TURN_RAD = 0.35  # at most, either way
CANVAS_TO_DIGIT = (1.4, 2.2)  # side of the canvas over the side of the digit
REACH = 0.9  # 1 would let a digit touch the edge of the canvas
INK, PAPER = (0.6, 1.0), (0.0, 0.4)  # colour of each channel
TEXTURE_CELLS, TEXTURE_STD = 8, 0.07
SEED = 0

DESCRIPTION = repr((SIZE_PX, SCATTERINGS, TEST_DIGITS, TURN_RAD, CANVAS_TO_DIGIT, REACH, INK, PAPER, TEXTURE_STD, SEED))


def scattered(split: str, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, SIZE_PX, SIZE_PX, 3] and classes int64 [N] of "train" or "test"; the same on every machine."""
    from sklearn.datasets import load_digits  # seconds to import, and other sources need none of it

    pictures, classes = load_digits(return_X_y=True)
    permutation = np.random.default_rng(seed).permutation(len(classes))
    chosen = permutation[:TEST_DIGITS] if split == "test" else permutation[TEST_DIGITS:]
    ids = np.repeat(chosen, SCATTERINGS[split])  # [N]
    rng = np.random.default_rng((seed, list(SCATTERINGS).index(split)))
    shape = _lay(np.asarray(pictures)[ids].reshape(-1, 8, 8) / 16.0, rng)[..., None]  # [N, S, S, 1]
    ink = rng.uniform(*INK, (len(ids), 1, 1, 3))
    paper = rng.uniform(*PAPER, (len(ids), 1, 1, 3)) + _texture(len(ids), rng)
    colour = shape * ink + (1 - shape) * paper
    return np.rint(colour.clip(0, 1) * 255).astype(np.uint8), np.asarray(classes)[ids].astype(np.int64)


def encode(image: np.ndarray) -> bytes:
    """PNG of an image uint8 [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _lay(digits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each digit [8, 8] turned, scaled and moved onto its own canvas: [N, 8, 8] -> [N, S, S] in [0, 1]."""
    n = len(digits)
    turn = rng.uniform(-TURN_RAD, TURN_RAD, n)
    ratio = rng.uniform(*CANVAS_TO_DIGIT, n)
    reach = (1 - 1 / ratio) * REACH  # the canvas is [-1, 1] both ways
    centre = rng.uniform(-1, 1, (2, n)) * reach
    grid = (np.arange(SIZE_PX) + 0.5) * 2 / SIZE_PX - 1
    y, x = np.meshgrid(grid, grid, indexing="ij")
    x = x[None] - centre[0][:, None, None]  # [N, S, S]
    y = y[None] - centre[1][:, None, None]
    cos, sin = (np.cos(turn) * ratio)[:, None, None], (np.sin(turn) * ratio)[:, None, None]
    side = digits.shape[-1]
    column = (cos * x - sin * y + 1) * side / 2 - 0.5  # where on the digit this pixel of the canvas looks
    row = (sin * x + cos * y + 1) * side / 2 - 0.5
    return _bilinear(np.pad(digits, ((0, 0), (1, 1), (1, 1))), row + 1, column + 1)


def _texture(n: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise for the paper, [N, S, S, 3]."""
    cells = rng.normal(0, TEXTURE_STD, (n * 3, TEXTURE_CELLS, TEXTURE_CELLS))
    at = ((np.arange(SIZE_PX) + 0.5) * TEXTURE_CELLS / SIZE_PX - 0.5).clip(0, TEXTURE_CELLS - 1)
    low = np.minimum(at.astype(np.int64), TEXTURE_CELLS - 2)
    part = at - low
    cells = cells[:, low] * (1 - part[:, None]) + cells[:, low + 1] * part[:, None]  # [N * 3, S, cells]
    cells = cells[:, :, low] * (1 - part) + cells[:, :, low + 1] * part  # [N * 3, S, S]
    return cells.reshape(n, 3, SIZE_PX, SIZE_PX).transpose(0, 2, 3, 1)


def _bilinear(planes: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Values of each plane [h, w] at its own rows and columns (clamped to the border): [N, h, w] -> [N, S, S]."""
    _, height, width = planes.shape
    row, column = row.clip(0, height - 1), column.clip(0, width - 1)
    top = np.minimum(row.astype(np.int64), height - 2)
    left = np.minimum(column.astype(np.int64), width - 2)
    down, right = row - top, column - left
    plane = np.arange(len(planes))[:, None, None]
    upper = planes[plane, top, left] * (1 - right) + planes[plane, top, left + 1] * right
    lower = planes[plane, top + 1, left] * (1 - right) + planes[plane, top + 1, left + 1] * right
    return upper * (1 - down) + lower * down
