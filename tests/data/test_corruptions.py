"""Corruptions: each against its closed form or another implementation, the draws being known."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from nvidia.dali import fn
from PIL import Image
from scipy import ndimage, stats

from distssl.data import corruptions, draws
from distssl.data.corruptions import Strength
from distssl.data.sample import Sample
from distssl.methods import corruption
from tests import graphs, planted

N, SIDE = 8, 112  # half of what lengths are given for
ARRAYS = [planted.pixels(i, (SIDE, SIDE)) for i in range(N)]
X = np.stack(ARRAYS).astype(np.float64)
U = draws.uniforms(0, 0, np.arange(N), 1 + corruptions.NUM_DRAWS)[:, 1:]


def corrupted(name: str, severity: float) -> np.ndarray:
    """[N, H, W, 3] of one type at a severity."""

    def views(sample: Sample) -> dict[str, Any]:
        how = corruptions.strength(sample, (severity, severity), SIDE)
        return {"view": corruptions.TYPES[name](sample.whole(), how)}

    got = graphs.run(views, [planted.encode(array) for array in ARRAYS])["view"]
    assert got.dtype == torch.uint8
    return got.permute(0, 2, 3, 1).numpy().astype(np.float64)


def rounded(x: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(x, 0, 255))


def noise() -> np.ndarray:
    """What the pieces see of the texture."""
    whole = corruptions.texture(SIDE).astype(np.float64) / corruptions.NOISE_STEP
    tops, lefts = (U[:, :2] * SIDE).astype(int).T
    cuts = [whole[top : top + SIDE, left : left + SIDE] for top, left in zip(tops, lefts, strict=True)]
    return np.stack(cuts)


def kernel_of(name: str, severity: float) -> np.ndarray:
    """The response to a single bright pixel: the filter, turned around."""

    def views(sample: Sample) -> dict[str, Any]:
        how = corruptions.strength(sample, (severity, severity), SIDE)
        return {"view": corruptions.TYPES[name](sample.whole(), how)}

    dot = np.zeros((SIDE, SIDE, 3), np.uint8)
    dot[56, 56] = 255
    return graphs.run(views, [planted.encode(dot)] * N)["view"][:, 0].double().numpy() / 255  # [N, H, W]


def test_the_texture_is_independent_normal_noise() -> None:
    x = corruptions.texture(224).astype(np.float64) / corruptions.NOISE_STEP
    assert x.shape == (448, 448, 3)
    assert abs(x.mean()) < 0.01
    assert x.std() == pytest.approx(1, abs=0.01)
    share = [float((x < level).mean()) for level in (-2.015, -0.985, 1.015, 2.015)]  # between two steps
    assert share == pytest.approx(stats.norm.cdf([-2.015, -0.985, 1.015, 2.015]), abs=0.01)
    for a, b in ((x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x[..., 1:], x[..., :-1])):
        assert abs((a * b).mean()) < 0.01


def test_clean_is_the_image() -> None:
    assert np.array_equal(corrupted("clean", 0.5), X)


@pytest.mark.parametrize("severity", [0.0, 1.0])
def test_noise_is_added_multiplied_or_put_in_place(severity: float) -> None:
    n = noise()
    sigma = 0.08 + 0.30 * severity
    assert np.abs(corrupted("gaussian_noise", severity) - rounded(X + 255 * sigma * n)).max() <= 1
    sigma = 0.15 + 0.45 * severity
    assert np.abs(corrupted("speckle_noise", severity) - rounded(X * (1 + sigma * n))).max() <= 1
    threshold = 2.17 - 1.07 * severity
    got = corrupted("impulse_noise", severity)
    assert np.array_equal(got, np.where(n > threshold, 255, np.where(n < -threshold, 0, X)))
    assert (np.abs(n) > threshold).mean() == pytest.approx((0.03, 0.27)[int(severity)], abs=0.01)


@pytest.mark.parametrize("severity", [0.0, 0.6, 1.0])
def test_gaussian_blur_is_scipys(severity: float) -> None:
    sigma = 0.5 + 2 * severity
    expected = ndimage.gaussian_filter(X, (0, sigma, sigma, 0), mode="mirror", radius=(0, 8, 8, 0))
    assert np.abs(corrupted("gaussian_blur", severity) - expected).max() <= 1.1


def test_box_blur_is_the_mean_of_a_square() -> None:
    severity = (2.5 - 0.75) / (4.25 - 0.75)  # half a width of 2.5 pixels: five of them
    expected = ndimage.uniform_filter(X, (0, 5, 5, 0), mode="mirror")
    assert np.abs(corrupted("box_blur", severity) - expected).max() <= 1.1


@pytest.mark.parametrize("severity", [0.0, 1.0])
def test_motion_blur_is_a_line_of_its_length_and_angle(severity: float) -> None:
    responses = kernel_of("motion_blur", severity)
    length = 2 * (1.25 + 3.5 * severity)
    y, x = np.mgrid[:SIDE, :SIDE] - 56.0
    for response, angle in zip(responses, np.pi * U[:, 2], strict=True):
        assert response.sum() == pytest.approx(1, abs=0.1)  # of rounded grey levels
        moments = np.array([[(x * x * response).sum(), (x * y * response).sum()], [0, (y * y * response).sum()]])
        along, across = np.linalg.eigh(moments + np.triu(moments, 1).T)[0][::-1] / response.sum()
        assert along == pytest.approx(length**2 / 12, rel=0.35, abs=0.1)
        assert across < 0.5
        turned = 0.5 * np.arctan2(2 * moments[0, 1], moments[0, 0] - moments[1, 1])
        assert abs(np.sin(turned - angle)) < 0.15


@pytest.mark.parametrize(("severity", "side"), [(0.0, 67), (0.5, 44), (1.0, 22)])
def test_pixelate_is_few_pixels_each_a_square(severity: float, side: int) -> None:
    got = corrupted("pixelate", severity)
    few = [Image.fromarray(array).resize((side, side), Image.Resampling.BILINEAR) for array in ARRAYS]
    expected = np.stack([np.asarray(image.resize((SIDE, SIDE), Image.Resampling.NEAREST)) for image in few])
    difference = np.abs(got - expected)
    assert difference.mean() < 1
    assert np.quantile(difference, 0.95) <= 3  # a border or a middle pixel may go the other way
    assert [len(np.unique(image.reshape(SIDE, -1), axis=0)) for image in got] == [side] * N


@pytest.mark.parametrize("severity", [0.0, 1.0])
def test_contrast_and_brightness_and_saturation_are_their_formulas(severity: float) -> None:
    mean = X.mean((1, 2), keepdims=True)
    expected = rounded(mean + (X - mean) * (0.4 - 0.35 * severity))
    assert np.abs(corrupted("contrast", severity) - expected).max() <= 1

    first = (U[:, 0] < 0.5)[:, None, None, None]
    assert 0 < first.sum() < N
    expected = rounded(X + np.where(first, -1, 1) * 255 * (0.15 + 0.35 * severity))
    assert np.abs(corrupted("brightness", severity) - expected).max() <= 1

    luma = X @ np.array([[0.299], [0.587], [0.114]])
    factor = np.where(first, 2 + 4 * severity, 0.3 - 0.3 * severity)
    expected = rounded(luma + factor * (X - luma))
    # Its matrix is rounded, and multiplied by the factor.
    assert (np.abs(corrupted("saturation", severity) - expected) <= 1 + 0.5 * factor).all()


@pytest.mark.parametrize("severity", [0.0, 1.0])
def test_occlusion_is_one_grey_rectangle_that_lies_inside(severity: float) -> None:
    got = corrupted("occlusion", severity)
    height = int(SIDE * (0.2 + 0.3 * severity) + 1e-4)
    for image, array, u in zip(got, X, U, strict=True):
        hidden = (image == 128).all(2) & (array != 128).any(2)
        rows, columns = np.nonzero(hidden.any(1))[0], np.nonzero(hidden.any(0))[0]
        width = SIDE * (0.2 + 0.3 * severity) * (0.75 + 0.5 * u[2])
        assert np.ptp(rows) + 1 == height
        assert np.ptp(columns) + 1 == pytest.approx(width - 0.5, abs=0.51)
        expected = array.copy()
        expected[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 128
        assert np.array_equal(image, expected)


@pytest.mark.parametrize(("severity", "levels"), [(0.0, 5), (0.5, 3), (1.0, 2)])
def test_posterise_leaves_a_few_levels(severity: float, levels: int) -> None:
    step = 256 / levels
    assert np.abs(corrupted("posterise", severity) - (np.floor(X / step) + 0.5) * step).max() <= 0.5


def test_every_type_changes_the_image_more_the_more_severe() -> None:
    for name in corruptions.TYPES.keys() - {"clean"}:
        light, strong = (np.abs(corrupted(name, severity) - X).mean() for severity in (0.0, 1.0))
        assert 0.3 < light < strong, name


def test_what_is_not_chosen_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def outside(image: Any, how: Strength) -> Any:
        return fn.slice(image, [SIDE, SIDE], [9, 9], axes=[0, 1])  # raises when it runs

    monkeypatch.setitem(corruptions.TYPES, "pixelate", outside)

    def views(sample: Sample, first: int) -> dict[str, Any]:
        how = corruptions.strength(sample, (0, 1), SIDE)
        chosen = first + sample.draws.integer(2)
        return {"view": corruptions.corrupt(sample.whole(), ["clean", "contrast", "pixelate"], chosen, how)}

    encoded = [planted.encode(array) for array in ARRAYS]
    second = draws.uniforms(0, 0, np.arange(N), 6)[:, 5] >= 0.5
    got = graphs.run(lambda sample: views(sample, 0), encoded)["view"].permute(0, 2, 3, 1).numpy()
    assert np.array_equal((got != X).any((1, 2, 3)), second)
    with pytest.raises(RuntimeError):
        graphs.run(lambda sample: views(sample, 1), encoded)


def test_the_types_that_can_be_held_out_are_all_but_clean() -> None:
    assert ["clean", *get_args(corruption.Held)] == list(corruptions.TYPES)
