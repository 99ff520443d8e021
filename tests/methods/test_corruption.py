"""Corruption: classes are equally likely, JPEG is all that happens to clean images, and the held-out test's area."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from distssl import config, method
from distssl.data import augment, corruptions
from distssl.data.sample import Sample
from distssl.errors import ConfigError
from distssl.methods import corruption
from distssl.methods.corruption import Config, Corruption
from tests import graphs, planted

# So small an image is hardly blurred at a low severity.
CFG = Config.model_validate({"severity": [0.5, 1.0], "augment": {"resize_px": 44, "size_px": 40, "flip": 0}})


def views(sample: Sample) -> dict[str, Any]:
    return Corruption.views(CFG, sample)


def pixels(image: Tensor) -> np.ndarray:
    """What was normalised, uint8 [N, H, W, 3]."""
    x = image.permute(0, 2, 3, 1).double().numpy()
    return np.rint((x * augment.STD + augment.MEAN) * 255).astype(np.uint8)


def test_each_class_is_equally_likely_and_none_is_held_out() -> None:
    cfg = Config.model_validate({"augment": {"resize_px": 8, "size_px": 8}})
    kinds = graphs.run(lambda sample: Corruption.views(cfg, sample), [planted.picture(1, size=(9, 8))] * 2000)["kind"]
    counts = kinds.bincount()
    assert len(counts) == len(cfg.classes) == 10
    assert (counts - 200).abs().max() < 60  # 4.5 deviations
    assert not set(cfg.classes) & set(cfg.held_out)
    assert cfg.classes[0] == "clean"


def test_a_clean_image_differs_from_its_source_by_the_jpeg_alone() -> None:
    num = 60
    encoded = [planted.picture(i) for i in range(num)]

    def with_source(sample: Sample) -> dict[str, Any]:
        made = views(sample)
        num_taken, sample.draws.num_taken = sample.draws.num_taken, 1  # the crop's draws again
        source = augment.crop(sample, CFG.augment)
        sample.draws.num_taken = num_taken
        return made | {"source": source}

    got = graphs.run(with_source, encoded)
    source = got["source"].permute(0, 2, 3, 1).numpy()
    image, clean = pixels(got["image"]), got["kind"].numpy() == 0
    assert 2 <= clean.sum() <= 15
    for i in range(num):
        matches = []
        for quality in range(60, 96):
            file = io.BytesIO()
            Image.fromarray(source[i]).save(file, "JPEG", quality=quality)
            matches.append(np.array_equal(np.asarray(Image.open(file)), image[i]))
        assert any(matches) == clean[i]


def test_every_image_goes_through_jpeg_of_every_quality_of_the_range() -> None:
    def encoded_again(sample: Sample) -> dict[str, Any]:
        return {"view": corruptions.reencode(sample.whole(), sample, (70, 73))}

    array = planted.pixels(3)
    got = graphs.run(encoded_again, [planted.encode(array)] * 60)["view"].permute(0, 2, 3, 1).numpy()
    seen = []
    for quality in range(70, 74):
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=quality)
        seen.append((got == np.asarray(Image.open(file))).all((1, 2, 3)))
    assert np.stack(seen).any(1).all()
    assert np.stack(seen).any(0).all()


def test_views_are_the_same_bits_in_any_batch() -> None:
    encoded = [planted.picture(i) for i in range(24)]
    together = graphs.run(views, encoded)
    assert len(together["kind"].unique()) > 6
    for start in range(0, 24, 5):
        ids = list(range(start, min(start + 5, 24)))
        part = graphs.run(views, [encoded[i] for i in ids], ids)
        assert all(torch.equal(part[name], together[name][ids]) for name in together)


class Roughness(nn.Module):
    """A backbone whose only feature is how unlike neighbours are."""

    num_features = 1

    def forward(self, x: Tensor) -> Tensor:
        return (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))[:, None]


def test_the_area_of_the_held_out_test_is_the_share_of_pairs_in_the_right_order() -> None:
    built = Corruption(CFG, Roughness())  # pyright: ignore[reportArgumentType]
    with torch.no_grad():  # p(clean) falls with roughness
        built.classifier.weight.copy_(torch.linspace(0, 1, 10)[:, None])
        built.classifier.bias.zero_()
    encoded = [planted.picture(i, "JPEG") for i in range(30)]
    batches = []
    for ids in (list(range(20)), list(range(20, 30))):
        batches.append(graphs.run(lambda sample: corruption.exam(CFG, sample), [encoded[i] for i in ids], ids))
    assert list(batches[0]) == ["id", "label", "clean", "speckle_noise", "box_blur", "posterise"]
    got = corruption.held_out_auc(built, batches)
    rough = {
        name: torch.cat([built.backbone(batch[name]) for batch in batches])[:, 0] for name in ("clean", *CFG.held_out)
    }
    for name in CFG.held_out:
        pairs = rough["clean"][:, None] - rough[name]
        expected = ((pairs < 0).double() + 0.5 * (pairs == 0).double()).mean()
        assert got[name] == pytest.approx(float(expected), abs=1e-9)
    assert got["speckle_noise"] > 0.9
    assert built.training


def test_the_test_shows_one_crop_clean_and_with_each_held_out_type() -> None:
    got = graphs.run(lambda sample: corruption.exam(CFG, sample), [planted.picture(i) for i in range(10)])
    clean = got["clean"]
    for name in CFG.held_out:
        assert 0.02 < (got[name] - clean).abs().mean() < 1.5
        flat = torch.stack([got[name].mean((1, 2, 3)), clean.mean((1, 2, 3))])
        assert torch.corrcoef(flat)[0, 1] > 0.7


def test_the_loss_is_the_cross_entropy_of_the_kind() -> None:
    built = Corruption(CFG, Roughness())  # pyright: ignore[reportArgumentType]
    got = graphs.run(views, [planted.picture(i) for i in range(6)])
    logits = built.classifier(built.backbone(got["image"]))
    expected = -logits.log_softmax(1)[torch.arange(6), got["kind"].long()].mean()
    torch.testing.assert_close(built.loss(got)["loss"], expected)
    [picture] = built.picture(got)
    assert torch.equal(picture, got["image"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("method.held_out=[clean]", "method.held_out.0='clean'"),
        ("method.severity=[0.5,0.2]", r"severity=\[0.5, 0.2\]"),
        ("method.quality=[0,90]", r"quality=\[0, 90\]"),
        (f"method.held_out=[{','.join(name for name in corruptions.TYPES if name != 'clean')}]", "leaves nothing"),
    ],
)
def test_what_cannot_be_is_refused(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(None, ["data.source=x", "method.name=corruption", option], method.options)
