"""Jigsaw: tiles are the image's pixels in their cells, and the classifier sees them in the label's order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distssl import config, method
from distssl.data import draws, patches, pixels
from distssl.errors import ConfigError
from distssl.methods import jigsaw
from tests import graphs, planted

SIDE, SQUARE, CELL, TILE = 240, 210, 70, 60
CFG = jigsaw.Config.model_validate(
    {"tile_px": TILE, "grey": 0, "permutations": 30, "augment": {"resize_px": SIDE, "size_px": SQUARE}}
)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permutations are kept below the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))


class Marks(nn.Module):
    """A backbone whose features are the tile's first pixels."""

    num_features = 4

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, 0, :4]


def small(**options: object) -> jigsaw.Jigsaw:
    return jigsaw.Jigsaw(jigsaw.Config.model_validate(jigsaw.Config.small | options), Marks())  # pyright: ignore


def test_each_tile_is_the_images_pixels_at_a_drawn_place_of_its_cell() -> None:
    num = 40
    views = graphs.run(lambda sample: jigsaw.Jigsaw.views(CFG, sample), [graphs.coordinates(SIDE)] * num)
    tiles = patches.unstack(views["tiles"], 9).long()  # [N, 9, 3, t, t]
    u = draws.uniforms(0, 0, np.arange(num), 4 + 18 + 1)
    corner = np.round(u[:, 1::-1] * (SIDE - SQUARE))  # top, left
    jitter = np.floor(u[:, 4:22].reshape(num, 9, 2) * (CELL - TILE + 1))
    cells = np.stack(np.divmod(np.arange(9), 3), axis=1) * CELL  # [9, 2]
    expected = torch.from_numpy(corner[:, None] + cells + jitter).long()
    assert torch.equal(tiles[:, :, 1, 0, 0], expected[..., 0])
    assert torch.equal(tiles[:, :, 0, 0, 0], expected[..., 1])
    assert (tiles[:, :, 1] - tiles[:, :, 1, :1, :1] == torch.arange(TILE)[:, None]).all()
    assert (tiles[:, :, 0] - tiles[:, :, 0, :1, :1] == torch.arange(TILE)).all()
    assert set(jitter.ravel()) == set(range(CELL - TILE + 1))
    assert np.array_equal(views["order"].numpy(), np.floor(u[:, 22] * 30))


def test_a_flip_turns_the_whole_image_before_it_is_cut() -> None:
    cfg = CFG.model_copy(update={"augment": CFG.augment.model_copy(update={"flip": 1.0})})
    tiles = graphs.run(lambda sample: jigsaw.Jigsaw.views(cfg, sample), [graphs.coordinates(SIDE)])["tiles"]
    columns = patches.unstack(tiles, 9)[0, :3, 0, 0, 0].long()
    assert columns[0] > columns[1] > columns[2]


def test_grey_is_of_the_whole_image_with_its_probability() -> None:
    cfg = CFG.model_copy(update={"grey": 0.66})
    views = graphs.run(lambda sample: jigsaw.Jigsaw.views(cfg, sample), [graphs.coordinates(SIDE)] * 60)
    tiles = patches.unstack(views["tiles"], 9)
    grey = (tiles == tiles[:, :, :1]).all(4).all(3).all(2)  # [N, 9]
    assert torch.equal(
        grey, torch.from_numpy(draws.uniforms(0, 0, np.arange(60), 3)[:, 2] < 0.66)[:, None].expand(-1, 9)
    )


def test_views_are_the_same_bits_in_any_batch() -> None:
    encoded = [planted.picture(i, size=(300, 320)) for i in range(4)]
    together = graphs.run(lambda sample: jigsaw.Jigsaw.views(CFG, sample), encoded)
    for i in range(4):
        alone = graphs.run(lambda sample: jigsaw.Jigsaw.views(CFG, sample), encoded[i : i + 1], ids=[i])
        assert all(torch.equal(alone[name][0], together[name][i]) for name in together)


def test_standardised_tiles_have_mean_0_and_deviation_1_in_each_channel() -> None:
    tiles = torch.randint(0, 256, (2, 9, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tiles[0, 0, 1] = 77  # even
    x = tiles.double()
    mean = x.mean((3, 4), keepdim=True)
    deviation = (x - mean).square().mean((3, 4), keepdim=True).sqrt()
    deviation[0, 0, 1] = 1
    got = jigsaw.standardise(tiles)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), (x - mean) / deviation, rtol=0, atol=1e-5)
    assert (got[0, 0, 1] == 0).all()


def test_the_classifier_sees_the_tiles_in_the_order_of_the_label() -> None:
    built = small()
    tiles = torch.zeros(10, 9, 3, 8, 8, dtype=torch.uint8)
    tiles[:, torch.arange(9), :, :, :4] = torch.arange(9, dtype=torch.uint8)[:, None, None, None] * 20 + 10
    tiles[:, torch.arange(9), 0, 0, torch.arange(9) % 4] += torch.arange(1, 10, dtype=torch.uint8)  # tells tiles apart
    stacked = tiles.transpose(1, 2).flatten(2, 3)  # [N, 3, 9 t, t]
    seen: list[Tensor] = []
    built.classifier.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    labels = torch.arange(10, dtype=torch.int32)
    out = built.loss({"tiles": stacked, "order": labels})
    features = jigsaw.standardise(tiles)[:, :, 0, 0, :4]  # [N, 9, 4]
    for k in range(10):
        expected = torch.cat([features[k, tile] for tile in built.permutations[k].tolist()])
        assert torch.equal(seen[0][k], expected)
    logits = built.classifier(seen[0])
    expected = -logits.log_softmax(1)[torch.arange(10), labels.long()].mean()
    torch.testing.assert_close(out["loss"], expected)
    assert float(out["accuracy"]) == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_the_picture_shows_the_question_and_the_answer() -> None:
    cfg = CFG.model_copy(update={"tile_px": 8, "augment": CFG.augment.model_copy(update={"size_px": 240})})
    built = jigsaw.Jigsaw(cfg, Marks())  # pyright: ignore[reportArgumentType]
    views = graphs.run(lambda sample: jigsaw.Jigsaw.views(cfg, sample), [graphs.coordinates(SIDE)] * 3)
    asked, answer = built.picture(views)
    assert asked.shape == answer.shape == (3, 3, 30, 30)
    places = pixels.normalised(patches.unstack(views["tiles"], 9) / 255)
    for n in range(3):
        for i, tile in enumerate(built.permutations[int(views["order"][n])].tolist()):
            y, x = 10 * (i // 3) + 1, 10 * (i % 3) + 1
            assert torch.equal(asked[n, :, y : y + 8, x : x + 8], places[n, tile])
            assert torch.equal(answer[n, :, y : y + 8, x : x + 8], places[n, i])


def test_evaluation_sees_the_square_not_a_tile() -> None:
    assert jigsaw.Jigsaw.view_size_px(jigsaw.Config()) == 255


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["method.tile_px=90"], "tile_px=90 must be at most augment.size_px / grid, 85"),
        (["method.grid=4"], "method.grid=4"),
        (["method.permutations=1"], "method.permutations=1"),
        (["method.grid=2", "method.permutations=25"], "method.permutations=25: 4 tiles have 24"),
    ],
)
def test_what_cannot_be_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method.build(
            config.load(
                None, ["data.source=x", "method.name=jigsaw", "model.backbone=resnet8", *options], method.options
            )
        )
