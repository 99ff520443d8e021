"""RandAugment: each operation against PIL's or numpy's, on pixels that went through DALI's decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from PIL import Image, ImageEnhance, ImageOps

from distssl.data import graph, randaugment
from distssl.data.randaugment import RandAugment, Strength
from distssl.data.sample import Sample
from tests import graphs, planted

SIZE = 32
ARRAYS = [planted.pixels(i, size=(SIZE, SIZE)) for i in range(4)]


def run(views: graph.Views, n: int) -> dict[str, torch.Tensor]:
    return graphs.run(views, [planted.encode(ARRAYS[i % len(ARRAYS)]) for i in range(n)])


def after(operation: Callable[[Any, Strength], Any], signed: float) -> np.ndarray:
    """The images after an operation at a strength, uint8 [N, SIZE, SIZE, 3]."""

    def views(sample: Sample) -> dict[str, Any]:
        zero = 0.0 * sample.draws.unit()
        how = Strength(zero + abs(signed), zero + signed, SIZE, "cpu")
        return {"view": operation(sample.whole(), how)}

    return run(views, len(ARRAYS))["view"].permute(0, 2, 3, 1).numpy()


def affine(*matrix: float) -> Callable[[Image.Image], Image.Image]:
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
    )


PIL: dict[str, tuple[float, Callable[[Image.Image], Image.Image], float]] = {  # strength, reference, grey levels
    "identity": (0.5, lambda image: image, 0),
    "autocontrast": (0.5, ImageOps.autocontrast, 1),
    "equalize": (0.5, ImageOps.equalize, 6),  # OpenCV's rounding, in DALI, where PIL has its own
    "solarize": (0.5, lambda image: ImageOps.solarize(image, 128), 0),
    "posterize": (0.7, lambda image: ImageOps.posterize(image, 5), 0),
    "brightness": (-0.6, lambda image: ImageEnhance.Brightness(image).enhance(0.46), 1),
    "sharpness": (0.8, lambda image: ImageEnhance.Sharpness(image).enhance(1.72), 2),
    "rotate": (0.5, lambda image: image.rotate(-15, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)), 4),
    "shear_x": (0.5, affine(1, 0.15, 0, 0, 1, 0), 4),
    "shear_y": (0.5, affine(1, 0, 0, 0.15, 1, 0), 4),
    "translate_x": (0.5, affine(1, 0, 0.15 * SIZE, 0, 1, 0), 4),
    "translate_y": (0.5, affine(1, 0, 0, 0, 1, 0.15 * SIZE), 4),
}


@pytest.mark.parametrize("name", PIL)
def test_an_operation_is_pils(name: str) -> None:
    signed, reference, levels = PIL[name]
    got = after(getattr(randaugment, name), signed)[:, 2:-2, 2:-2].astype(int)
    images = [reference(Image.fromarray(array)) for array in ARRAYS]
    expected = np.stack([np.asarray(image) for image in images])[:, 2:-2, 2:-2].astype(int)
    mirrored = -signed if name in {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"} else signed
    other = after(getattr(randaugment, name), mirrored)[:, 2:-2, 2:-2].astype(int)
    errors = [np.quantile(np.abs(found - expected), 0.95) for found in (got, other)]
    assert min(errors) <= levels  # which way a positive strength turns is a convention


def test_contrast_and_colour_at_zero_leave_the_image() -> None:
    for operation in (randaugment.contrast, randaugment.colour, randaugment.sharpness, randaugment.brightness):
        assert np.abs(after(operation, 0.0).astype(int) - np.stack(ARRAYS)).max() <= 1


def test_every_operation_is_as_likely_and_every_image_gets_a_hole() -> None:
    def views(sample: Sample) -> dict[str, Any]:
        return {"chosen": sample.draws.integer(len(randaugment.OPERATIONS))}

    counts = np.bincount(run(views, 2800)["chosen"].numpy(), minlength=14)
    assert np.abs(counts - 200).max() < 60

    def holes(sample: Sample) -> dict[str, Any]:
        image = fn.resize(sample.whole(), size=(SIZE, SIZE)) * 0
        return {"view": randaugment.cut_out(fn.cast_like(image, sample.whole()), sample.draws, 16, SIZE)}

    areas = (run(holes, 500)["view"][:, 0] == randaugment.GREY).float().mean((1, 2))
    assert areas.max() == 0.25  # half of either side
    assert areas.min() >= 0.06  # its middle is inside
    assert areas.unique().numel() > 10


def test_views_do_not_depend_on_the_batch_they_are_in() -> None:
    def views(sample: Sample) -> dict[str, Any]:
        return {"view": randaugment.view(sample.whole(), sample, RandAugment(), SIZE)}

    together = run(views, 24)["view"]
    assert torch.equal(run(views, 8)["view"], together[:8])
