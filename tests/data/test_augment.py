"""Augmentations: each against its closed form or another implementation, on pixels that went through DALI's decoder."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn, types
from PIL import Image, ImageOps
from scipy import ndimage, stats
from torchvision.transforms import RandomResizedCrop, v2

from distssl.data import augment, draws
from distssl.data.sample import Sample
from tests import planted
from tests.graphs import run


def through(piece: Callable[[Any, draws.Draws], Any], arrays: list[np.ndarray]) -> np.ndarray:
    """Images after one graph piece, [N, H, W, C]."""

    def views(sample: Sample) -> dict[str, Any]:
        image = fn.decoders.image(sample.encoded, output_type=types.RGB)
        return {"view": piece(image, sample.draws)}

    return run(views, [planted.encode(array) for array in arrays])["view"].permute(0, 2, 3, 1).numpy()


ARRAYS = [planted.pixels(i) for i in range(6)]


def coordinates(height: int, width: int) -> bytes:
    """Red is the column, green the row."""
    y, x = np.mgrid[:height, :width]
    return planted.encode(np.stack([x, y, 0 * x], axis=2).astype(np.uint8))


def crops(height: int, width: int, area: tuple[float, float], aspect: tuple[float, float], n: int = 2000) -> np.ndarray:
    """Left, top, width and height in pixels of n crops, measured in their pixels, [n, 4]."""

    def views(sample: Sample) -> dict[str, Any]:
        return {"view": augment.random_resized_crop(sample, 16, area, aspect)}

    view = run(views, [coordinates(height, width)] * n)["view"].float().numpy()  # [n, 3, 16, 16]
    # The outermost pixels are filtered with the border, so the slope is taken inside.
    slope = [(view[:, 0, 8, 12] - view[:, 0, 8, 3]) / 9, (view[:, 1, 12, 8] - view[:, 1, 3, 8]) / 9]
    middle = [view[:, 0, 8, 7:9].mean(1) + 0.5, view[:, 1, 7:9, 8].mean(1) + 0.5]
    size = [16 * s for s in slope]
    return np.stack([middle[0] - size[0] / 2, middle[1] - size[1] / 2, *size], axis=1)


@pytest.mark.parametrize(("height", "width"), [(200, 250), (250, 200), (150, 250)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    area, aspect, n = (0.1, 1.0), (3 / 4, 4 / 3), 2000
    left, top, w, h = crops(height, width, area, aspect, n).T
    image = torch.empty(1, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = [RandomResizedCrop.get_params(image, list(area), list(aspect)) for _ in range(n)]
    their_top, their_left, their_h, their_w = np.array(theirs).T
    whole = (their_w == width) | (their_h == height)  # its way out when nothing fits is centred, ours is not
    for ours, reference in ((w * h, their_w * their_h), (np.log(w / h), np.log(their_w / their_h))):
        assert stats.ks_2samp(ours, reference).statistic < 0.06  # of 2000 each: 1 in 700 pairs is worse
    for start, room, reference in (
        (left, width - w, their_left / (width - their_w + 1)),
        (top, height - h, their_top / (height - their_h + 1)),
    ):
        inside = room > 5
        assert stats.ks_2samp((start / room.clip(1))[inside], reference[~whole]).statistic < 0.08


def test_where_no_attempt_fits_the_crop_is_the_largest_of_an_allowed_aspect() -> None:
    *_, w, h = crops(60, 250, (0.9, 1.0), (3 / 4, 4 / 3), n=20).T
    assert w == pytest.approx(80, abs=3)  # of whole pixels, measured on a slope of whole pixels
    assert h == pytest.approx(60, abs=3)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (3, 2)])
def test_images_of_a_few_pixels_have_views_too(size: tuple[int, int]) -> None:
    cfg = augment.Augment(size_px=16, solarize=0.5)

    def views(sample: Sample) -> dict[str, Any]:
        return {"view": augment.view(sample, cfg)}

    view = run(views, [planted.picture(i, size=size) for i in range(50)])["view"]
    assert view.shape == (50, 3, 16, 16)
    assert view.isfinite().all()


def test_grey_is_luma_in_three_channels() -> None:
    got = through(lambda image, d: augment.grey(image, d, 1.0), ARRAYS)
    luma = np.stack(ARRAYS) @ [0.299, 0.587, 0.114]
    assert (got == got[..., :1]).all()
    assert np.abs(got[..., 0] - luma).max() <= 1


@pytest.mark.parametrize("threshold", [0, 1, 128, 255])
def test_solarize_inverts_from_the_threshold_on(threshold: int) -> None:
    got = through(lambda image, d: augment.solarize(image, d, 1.0, threshold), ARRAYS)
    x = np.stack(ARRAYS)
    assert got.dtype == np.uint8
    assert np.array_equal(got, np.where(x >= threshold, 255 - x, x))


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.0, 2.0])
def test_blur_is_a_gaussian_of_its_sigma(sigma: float) -> None:
    got = through(lambda image, d: augment.blur(image, d, "cpu", 1.0, (sigma, sigma)), ARRAYS)
    radius = int(np.ceil(3 * sigma))
    x = np.stack(ARRAYS).astype(float)
    expected = ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="mirror", radius=(0, radius, radius, 0))
    assert np.abs(got - expected).max() <= 1.1  # rounded after each of its two passes


def test_colour_jitter_of_no_strength_leaves_the_image_alone_and_brightness_multiplies() -> None:
    still = augment.Augment(jitter=1, brightness=0, contrast=0, saturation=0, hue_degrees=0)
    got = through(lambda image, d: augment.colour_jitter(image, d, still), ARRAYS)
    assert np.abs(got - np.stack(ARRAYS).astype(int)).max() <= 1
    bright = still.model_copy(update={"brightness": 0.8})
    got = through(lambda image, d: augment.colour_jitter(image, d, bright), ARRAYS)
    factor = 0.2 + 1.6 * draws.uniforms(0, 0, np.arange(6), 2)[:, 1]
    expected = np.clip(np.stack(ARRAYS) * factor[:, None, None, None], 0, 255)
    assert np.abs(got - expected).max() <= 2


@pytest.mark.parametrize("name", ["colour_jitter", "grey", "blur", "solarize"])
def test_a_probability_of_zero_does_nothing_and_a_half_does_half(name: str) -> None:
    cfg = augment.Augment(jitter=0)
    half = augment.Augment(jitter=0.5)
    pieces: dict[str, Callable[[Any, draws.Draws, float], Any]] = {
        "colour_jitter": lambda image, d, p: augment.colour_jitter(image, d, half if p else cfg),
        "grey": lambda image, d, p: augment.grey(image, d, p),
        "blur": lambda image, d, p: augment.blur(image, d, "cpu", p, (1.0, 2.0)),
        "solarize": lambda image, d, p: augment.solarize(image, d, p, 0),
    }
    arrays = [ARRAYS[0]] * 400
    assert (through(lambda image, d: pieces[name](image, d, 0.0), arrays) == ARRAYS[0]).all()
    changed = (through(lambda image, d: pieces[name](image, d, 0.5), arrays) != ARRAYS[0]).any((1, 2, 3))
    assert np.array_equal(changed, draws.uniforms(0, 0, np.arange(400), 1)[:, 0] < 0.5)


def test_normalise_is_its_closed_form_and_mirrors_left_to_right() -> None:
    def normalised(image: Any, d: draws.Draws) -> Any:
        return augment.normalise(image, mirror=d.coin(0.5))

    got = through(normalised, ARRAYS)
    coin = draws.uniforms(0, 0, np.arange(6), 1)[:, 0] < 0.5
    assert 0 < coin.sum() < 6
    expected = (np.stack(ARRAYS) / 255 - augment.MEAN) / augment.STD
    expected[coin] = expected[coin, :, ::-1]
    assert got.dtype == np.float32
    assert got == pytest.approx(expected, abs=1e-5)


def centre(sample: Sample) -> dict[str, Any]:
    return {"view": augment.centre_crop(sample, 32, 36)}


@pytest.mark.parametrize("size", [(54, 36), (36, 54), (300, 200), (36, 36), (20, 30)])
def test_centre_crop_is_torchvisions(size: tuple[int, int]) -> None:
    # Sizes that leave an even margin: torchvision rounds half a pixel to the even one, DALI up.
    array = planted.pixels(1, size)
    got = run(centre, [planted.encode(array)])["view"][0].float()
    peer = v2.Compose([v2.Resize(36, antialias=True), v2.CenterCrop(32)])
    expected = peer(torch.from_numpy(array).permute(2, 0, 1)).float()
    assert (got - expected).abs().mean() < 1.5


ORIENTED = {}
for orientation in (1, 3, 6, 8):
    exif = Image.Exif()
    exif[0x0112] = orientation
    ORIENTED[f"exif {orientation}"] = planted.picture(1, "JPEG", exif=exif)
FINE = ORIENTED | {
    "grey jpeg": planted.picture(1, "JPEG", mode="L"),
    "cmyk jpeg": planted.picture(1, "JPEG", mode="CMYK"),
    "progressive jpeg": planted.picture(1, "JPEG", progressive=True),
    "grey png": planted.picture(1, mode="L"),
    "16 bit png": planted.encode(planted.pixels(1)[..., 0].astype(np.uint16) * 257),
    "rgba png": planted.picture(1, mode="RGBA"),
    "palette png": planted.picture(1, mode="P"),
    "webp": planted.picture(1, "WEBP"),
    "lossless webp with alpha": planted.picture(1, "WEBP", mode="RGBA", lossless=True),
    "bmp": planted.picture(1, "BMP"),
    "tiff": planted.picture(1, "TIFF"),
    "jpeg 2000": planted.picture(1, "JPEG2000"),
}


@pytest.mark.parametrize("name", FINE)
def test_every_kind_of_image_has_an_upright_view_of_three_channels(name: str) -> None:
    got = run(centre, [FINE[name]])["view"]
    assert got.shape == (1, 3, 32, 32)
    if name.startswith("16 bit"):  # PIL's own conversion of these clips
        image = Image.fromarray(np.repeat(planted.pixels(1)[..., :1], 3, axis=2))
    else:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(FINE[name]))).convert("RGB")
    expected = run(centre, [planted.encode(np.asarray(image))])["view"]
    assert (got.float() - expected.float()).abs().mean() < 3
