"""Relative position: patches lie where the label says, colour treatments are their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distssl import config, method
from distssl.data import draws, patches, pixels
from distssl.errors import ConfigError
from distssl.methods import relative_position
from distssl.methods.relative_position import Config, RelativePosition
from tests import graphs, planted

SIDE, PATCH, GAP, JITTER = 230, 50, 20, 7
GRID = {"patch_px": PATCH, "gap_px": GAP, "jitter_px": JITTER, "resize_px": [SIDE, SIDE]}
PLAIN = Config.model_validate({"grid": GRID, "colour": "none", "sample_down": 0})
PLACES = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x])


class Mean(nn.Module):
    """A backbone whose features are the channels' means."""

    num_features = 3

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def views_of(cfg: Config, encoded: list[bytes], ids: list[int] | None = None) -> dict[str, Tensor]:
    return graphs.run(lambda sample: RelativePosition.views(cfg, sample), encoded, ids)


def corners(views: dict[str, Tensor]) -> Tensor:
    """Top and left of both patches of a coordinate image, [N, 2, 2]."""
    pair = patches.unstack(views["pair"], 2).long()
    assert (pair[:, :, 1] - pair[:, :, 1, :1, :1] == torch.arange(PATCH)[:, None]).all()
    assert (pair[:, :, 0] - pair[:, :, 0, :1, :1] == torch.arange(PATCH)).all()
    return torch.stack([pair[:, :, 1, 0, 0], pair[:, :, 0, 0, 0]], dim=2)


def test_the_label_is_where_the_second_patch_lies_from_the_first() -> None:
    views = views_of(PLAIN, [graphs.coordinates(SIDE)] * 800)
    centre, other = corners(views).unbind(1)
    step = (other - centre).float() / (PATCH + GAP)
    nearest = (step[:, None] - PLACES).abs().sum(2).argmin(1)
    assert torch.equal(nearest, views["place"].long())
    moved = (other - centre) - PLACES[nearest] * (PATCH + GAP)  # the difference of two jitters
    jitter = np.floor(draws.uniforms(0, 0, np.arange(800), 10)[:, [[4, 5], [8, 9]]] * (2 * JITTER + 1))  # [N, 2, 2]
    assert np.array_equal(moved.numpy(), jitter[:, 1] - jitter[:, 0])
    assert moved.abs().max() == 2 * JITTER
    apart = (other - centre).abs().max(1).values - PATCH
    assert GAP - 2 * JITTER <= int(apart.min()) < GAP < int(apart.max()) <= GAP + 2 * JITTER
    assert views["place"].bincount(minlength=8).min() > 60  # of 100 each


def test_the_grid_lies_anywhere_in_the_image_and_its_place_does_not_tell_the_label() -> None:
    views = views_of(PLAIN, [graphs.coordinates(SIDE)] * 800)
    centre = corners(views)[:, 0].double()
    low, high = PATCH + GAP, SIDE - 2 * PATCH - GAP
    assert centre.amin() in range(low, low + 2)
    assert centre.amax() in range(high - 1, high + 1)
    offsets = PLACES[views["place"].long()].double()
    table = torch.corrcoef(torch.cat([centre, offsets], dim=1).T)
    assert table[:2, 2:].abs().max() < 4 / 800**0.5


def test_the_image_is_resized_to_a_random_short_side() -> None:
    cfg = PLAIN.model_copy(update={"grid": PLAIN.grid.model_copy(update={"resize_px": (230, 460)})})
    pair = patches.unstack(views_of(cfg, [graphs.coordinates(SIDE)] * 200)["pair"], 2).float()
    scale = 29 / (pair[:, 0, 0, 25, 39] - pair[:, 0, 0, 25, 10])  # pixels here to a pixel of the image
    assert scale.min() < 1.1
    assert scale.max() > 1.9
    assert scale.mean() == pytest.approx(1.5, abs=0.1)


def test_views_are_the_same_bits_in_any_batch() -> None:
    cfg = Config.model_validate(Config.small)
    encoded = [planted.picture(i) for i in range(12)]
    together = views_of(cfg, encoded)
    for i in range(12):
        alone = views_of(cfg, encoded[i : i + 1], ids=[i])
        assert all(torch.equal(alone[name][0], together[name][i]) for name in together)


def test_some_patches_are_sampled_down() -> None:
    always, sometimes = (PLAIN.model_copy(update={"sample_down": p}) for p in (1.0, 0.4))
    encoded = [planted.encode(np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), np.uint8)) for i in range(60)]

    def spread(cfg: Config) -> Tensor:
        return patches.unstack(views_of(cfg, encoded)["pair"], 2).float().std((2, 3, 4))  # [N, 2]

    whole, down, some = spread(PLAIN), spread(always), spread(sometimes)
    assert (down < whole).float().mean() > 0.95  # averaging takes noise away
    assert (some < whole - 1).float().mean() == pytest.approx(0.4, abs=0.15)
    assert (((some - whole).abs() < 1e-3) | ((some - down).abs() < 1e-3)).all()
    assert down.min() > 0.5 * whole.mean() * 10 / PATCH  # 100 pixels, not fewer


def test_dropped_channels_are_noise_of_a_hundredth_of_the_kept_ones_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(6, 2, 3, 40, 40, generator=generator) * torch.tensor([1.0, 5.0, 0.2])[:, None, None] + 3
    kept = torch.randint(0, 3, (6, 2), generator=generator)
    seeds = torch.randint(0, 2**24, (6, 4), generator=generator, dtype=torch.int32)
    got = relative_position.drop(pair, kept, seeds)
    dropped = []
    for n in range(6):
        for p in range(2):
            k = int(kept[n, p])
            assert torch.equal(got[n, p, k], pair[n, p, k])
            noise = got[n, p, [c for c in range(3) if c != k]] / (pair[n, p, k].std() / 100)
            assert noise.std() == pytest.approx(1, abs=0.1)
            dropped.append(noise[0].flatten())
    assert abs(torch.stack(dropped).mean()) < 0.05
    off = torch.corrcoef(torch.stack(dropped)) - torch.eye(12)
    assert off.abs().max() < 5 / 1600**0.5
    for n in range(6):
        assert torch.equal(relative_position.drop(pair[n : n + 1], kept[n : n + 1], seeds[n : n + 1])[0], got[n])


def test_projection_takes_green_against_magenta_away_and_nothing_else() -> None:
    pair = torch.randint(0, 256, (2, 2, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = relative_position.project(pair).double()
    a = torch.tensor([-1.0, 2.0, -1.0], dtype=torch.float64)
    assert torch.einsum("c,npchw->nphw", a, got).abs().max() < 1e-3  # of sums up to 1020
    along = torch.einsum("c,npchw->nphw", a, pair.double()) / 6
    torch.testing.assert_close(got, pair.double() - along[:, :, None] * a[:, None, None], rtol=0, atol=1e-3)
    grey = torch.full((1, 1, 3, 2, 2), 99, dtype=torch.uint8)
    torch.testing.assert_close(relative_position.project(grey), grey.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("colour", ["drop", "project", "none"])
def test_the_loss_is_of_the_pair_in_its_order_and_the_picture_shows_it_in_place(colour: str) -> None:
    cfg = Config.model_validate(Config.small | {"colour": colour})
    built = RelativePosition(cfg, Mean())  # pyright: ignore[reportArgumentType]
    views = views_of(cfg, [planted.picture(i) for i in range(5)])
    [picture] = built.picture(views)
    assert picture.shape == (5, 3, 36, 36)
    cells = [place + (place > 3) for place in views["place"].tolist()]

    def at(n: int, cell: int) -> Tensor:
        y, x = 12 * (cell // 3) + 1, 12 * (cell % 3) + 1
        return picture[n, :, y : y + 10, x : x + 10]

    pair = torch.stack([torch.stack([at(n, 4), at(n, cell)]) for n, cell in enumerate(cells)])  # [N, 2, 3, t, t]
    logits = built.classifier(pair.mean((3, 4)).flatten(1))
    expected = -logits.log_softmax(1)[torch.arange(5), views["place"].long()].mean()
    torch.testing.assert_close(built.loss(views)["loss"], expected)
    if colour == "none":
        assert torch.equal(pair, pixels.normalised(patches.unstack(views["pair"], 2) / 255))


def test_evaluation_sees_the_side_of_the_grid() -> None:
    assert RelativePosition.view_size_px(Config()) == 3 * 96 + 2 * 48 + 2 * 7


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("method.grid.resize_px=[300,500]", r"resize_px=\[300, 500\] must ascend from at least 398"),
        ("method.grid.resize_px=[500,400]", "must ascend"),
        ("method.sample_down_pixels=9999", "must be at most 9216"),
        ("method.colour=grey", "method.colour='grey'"),
    ],
)
def test_what_cannot_be_is_refused(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(None, ["data.source=x", "method.name=relative_position", option], method.options)
