"""Textured scenes with known depth, drawn here and so no evidence about photographs: a floor, a wall and boxes on it.

A pinhole camera at a random height looks ahead. The nearer a surface, the larger its texture; boxes stand on the floor,
so their feet, size and texture all tell their depth.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIZE_PX = 128
FAR_M = 20.0  # of the wall, at most


def write(folder: Path, num: int, seed: int) -> Path:
    """NUM scenes as KEY.jpg and KEY.depth.png, in millimetres."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        image, depth = scene(np.random.default_rng([seed, i]))
        (folder / f"{i:05d}.jpg").write_bytes(_encoded(Image.fromarray(image), "JPEG", quality=90))
        (folder / f"{i:05d}.depth.png").write_bytes(_encoded(Image.fromarray(depth), "PNG"))
    return folder


def scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [S, S, 3] and uint16 [S, S], millimetres along the camera's axis."""
    focal, height_m = SIZE_PX * rng.uniform(0.7, 1.1), rng.uniform(1.0, 2.0)
    x, y = np.meshgrid(np.arange(SIZE_PX) - SIZE_PX / 2, np.arange(SIZE_PX) - SIZE_PX / 2)
    wall_m = rng.uniform(6, FAR_M)
    floor_m = np.where(y > 0, focal * height_m / np.maximum(y, 1e-6), np.inf)
    depth = np.minimum(floor_m, wall_m)
    on_floor = floor_m < wall_m
    image = np.where(
        on_floor[..., None],
        _texture(rng, x * depth / focal, depth),
        _texture(rng, x * wall_m / focal, y * wall_m / focal),
    )
    boxes = sorted(
        rng.uniform(1.5, wall_m, rng.integers(2, 6)), reverse=True
    )  # the farthest first: nearer ones hide it
    for at_m in boxes:
        width_m, tall_m, middle_m = rng.uniform(0.4, 1.5), rng.uniform(0.4, 1.8), rng.uniform(-0.4, 0.4) * at_m
        left, right = (focal * (middle_m + side * width_m / 2) / at_m for side in (-1, 1))
        foot, top = focal * height_m / at_m, focal * (height_m - tall_m) / at_m
        here = (x >= left) & (x < right) & (y >= top) & (y < foot)
        image = np.where(here[..., None], _texture(rng, x * at_m / focal, y * at_m / focal), image)
        depth = np.where(here, at_m, depth)
    image = image + rng.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8), (1000 * depth).round().astype(np.uint16)


def _texture(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Stripes and checks of random colours, u and v in metres along the surface: [S, S, 3]."""
    a, b = rng.uniform(30, 230, (2, 3))
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(0.15, 0.6)
    along, across = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
    waves = np.sin(2 * np.pi * along / pitch) * (np.sin(2 * np.pi * across / pitch) if rng.random() < 0.5 else 1.0)
    share = (0.5 + 0.5 * np.clip(4 * waves, -1, 1))[..., None]
    return a * share + b * (1 - share)


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
