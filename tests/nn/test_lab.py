from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import color

from distssl.data import augment
from distssl.nn import lab


def colours() -> torch.Tensor:
    """RGB in 0..1 over the whole cube, its corners and greys among them: float64 [1, 3, 18, 324]."""
    ramp = torch.cat([torch.linspace(0, 1, 16), torch.tensor([0.04, 0.0405])]).double()
    return torch.cartesian_prod(ramp, ramp, ramp).T.reshape(1, 3, 18, 324)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lab_agrees_with_scikit_image(dtype: torch.dtype) -> None:
    rgb = colours()
    theirs = color.rgb2lab(rgb[0].permute(1, 2, 0).numpy())
    ours = lab.of_rgb(rgb.to(dtype))[0].permute(1, 2, 0)
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-4)


def test_rgb_of_lab_agrees_with_scikit_image_and_undoes_lab() -> None:
    rgb = colours()
    found = lab.of_rgb(rgb)
    # Both of CIE 15's rounded constants meet at 1e-6, so this is as exact as the way back is.
    torch.testing.assert_close(lab.to_rgb(found), rgb, rtol=0, atol=1e-5)
    theirs = color.lab2rgb(found[0].permute(1, 2, 0).numpy())
    np.testing.assert_allclose(lab.to_rgb(found)[0].permute(1, 2, 0).numpy(), theirs, rtol=0, atol=1e-5)


def test_white_black_and_grey_have_no_colour() -> None:
    greys = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).expand(3, 3)[None, :, :, None]
    found = lab.of_rgb(greys)[0, :, :, 0]  # [3, greys]
    torch.testing.assert_close(found[0, ::2], torch.tensor([0.0, 100.0], dtype=torch.float64), rtol=0, atol=1e-4)
    assert found[1:].abs().max() < 0.01


def test_a_colour_outside_srgb_is_clipped() -> None:
    impossible = torch.tensor([50.0, 120.0, -120.0])[None, :, None, None]
    found = lab.to_rgb(impossible)
    assert found.min() == 0
    assert found.max() <= 1


def test_normalised_images_go_to_lab_and_back() -> None:
    mean, std = (torch.tensor(values)[:, None, None] for values in (augment.MEAN, augment.STD))
    rgb = colours().float()
    images = (rgb - mean) / std
    torch.testing.assert_close(lab.of_normalised(images), lab.of_rgb(rgb), rtol=0, atol=2e-3)
    torch.testing.assert_close(lab.to_normalised(lab.of_normalised(images)), images, rtol=0, atol=1e-3)


def test_autocast_does_not_make_lab_coarse() -> None:
    rgb = colours().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = lab.of_rgb(rgb)
    assert torch.equal(found, lab.of_rgb(rgb))
