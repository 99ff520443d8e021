"""Images with something on them that every kind of annotation marks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(90, 140), (128, 128), (150, 70), (61, 113)]
BLACK, RED = (0, 0, 0), (255, 0, 0)
METRES = {0: 4000, 1: 1500}  # depth of background and object, in millimetres


def images(folder: Path, num: int, seed: int = 0) -> Path:
    """Black images of four sizes with a red rectangle: its mask, depth, box, middle and a corner."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(num):
        height, width = SIZES[i % len(SIZES)]
        x0, y0 = int(rng.integers(5, width // 2)), int(rng.integers(5, height // 2))
        x1, y1 = x0 + int(rng.integers(15, width // 2 - 4)), y0 + int(rng.integers(15, height // 2 - 4))
        mask = np.zeros((height, width), np.uint8)
        mask[y0:y1, x0:x1] = 1
        files = {
            "png": _encoded(np.array([BLACK, RED], np.uint8)[mask]),
            "mask.png": _encoded(mask),
            "depth.png": _encoded(np.vectorize(METRES.get)(mask).astype(np.uint16)),
            "boxes.json": json.dumps([{"label": 0, "box": [x0, y0, x1, y1]}]).encode(),
            "keypoints.json": json.dumps([[(x0 + x1) / 2, (y0 + y1) / 2, 1], [x1, y1, int(i % 5 > 0)]]).encode(),
        }
        for suffix, data in files.items():
            (folder / f"{i:03d}.{suffix}").write_bytes(data)
    return folder


def _encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
