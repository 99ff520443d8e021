"""Patches: the pixels that were asked for, in their order, and sampling down and up as its filter says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distssl.data import augment, draws, patches, pixels
from distssl.data.sample import Sample
from tests import graphs, planted

CORNERS = [(0, 0), (3, 17), (50, 40), (59, 59)]


def test_stacked_patches_are_the_images_pixels_at_their_corners() -> None:
    def views(sample: Sample) -> dict[str, Any]:
        corners = [(sample.draws.integer(1) + top, sample.draws.integer(1) + left) for top, left in CORNERS]
        return {"stacked": patches.stack(sample.whole(), corners, 5)}

    got = patches.unstack(graphs.run(views, [graphs.coordinates(64)] * 2)["stacked"], len(CORNERS))
    assert got.shape == (2, 4, 3, 5, 5)
    for i, (top, left) in enumerate(CORNERS):
        assert torch.equal(got[1, i, 0], torch.arange(left, left + 5).expand(5, 5).to(torch.uint8))
        assert torch.equal(got[1, i, 1].T, torch.arange(top, top + 5).expand(5, 5).to(torch.uint8))
    assert got.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert got.data_ptr() == got.flatten(0, 1).data_ptr()


def resampling(before: int, after: int) -> np.ndarray:
    """Rows are the weights of a triangle as wide as a step, or as a pixel if that is wider; the border continues."""
    step = before / after
    width = max(step, 1)
    weights = np.zeros((after, before))
    for i in range(after):
        middle = (i + 0.5) * step - 0.5
        for j in range(int(middle - width) - 1, int(middle + width) + 2):
            weights[i, np.clip(j, 0, before - 1)] += max(0, 1 - abs(j - middle) / width)
    return weights / weights.sum(1, keepdims=True)


def test_patches_are_sampled_down_by_a_triangle_and_up_linearly() -> None:
    def views(sample: Sample) -> dict[str, Any]:
        return {"view": patches.down_and_up(sample.whole(), sample.draws, 0.5, 6.0, 44)}

    arrays = [planted.pixels(i, (44, 44)) for i in range(40)]
    got = graphs.run(views, [planted.encode(array) for array in arrays])["view"].permute(0, 2, 3, 1).numpy()
    coin, where = draws.uniforms(0, 0, np.arange(40), 2).T
    for i, array in enumerate(arrays):
        if coin[i] >= 0.5:
            assert np.array_equal(got[i], array)
            continue
        side = round(np.exp(np.log(6) + where[i] * np.log(44 / 6)))
        both = resampling(side, 44) @ resampling(44, side)
        assert np.abs(got[i] - np.einsum("ij,jkc,lk->ilc", both, array, both)).max() <= 1.5  # rounded twice


def test_normalised_is_what_the_graph_makes() -> None:
    def views(sample: Sample) -> dict[str, Any]:
        return {"raw": sample.whole(), "there": augment.normalise(sample.whole())}

    got = graphs.run(views, [planted.picture(1)])
    assert pixels.normalised(got["raw"] / 255) == pytest.approx(got["there"], abs=1e-5)


def test_mirror_turns_left_and_right_where_it_is_chosen() -> None:
    def views(sample: Sample) -> dict[str, Any]:
        return {"view": augment.flip(sample.whole(), sample.draws.coin(0.5))}

    x = torch.from_numpy(planted.pixels(2)).permute(2, 0, 1)
    got = graphs.run(views, [planted.encode(planted.pixels(2))] * 20)["view"]
    for view, unit in zip(got, draws.uniforms(0, 0, np.arange(20), 1)[:, 0], strict=True):
        assert torch.equal(view, x.flip(2) if unit < 0.5 else x)


def test_patches_are_laid_out_row_by_row() -> None:
    tiles = torch.arange(9.0)[None, :, None, None, None].expand(2, 9, 3, 4, 4) + 1
    picture = patches.laid_out(tiles, 3)
    assert picture.shape == (2, 3, 18, 18)
    assert picture[1, 2, 2::6, 2::6].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
