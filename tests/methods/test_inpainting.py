from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distssl import method
from distssl.data import augment
from distssl.methods import inpainting
from distssl.methods.inpainting import Inpainting
from tests import runs


def build(tmp_path: Path, *settings: str) -> Inpainting:
    found = method.build(runs.tiny(tmp_path, tmp_path, "method.name=inpainting", *settings)).double()
    assert isinstance(found, Inpainting)
    return found


def views(num: int = 4, blocks: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(num, 3, 32, 32, generator=generator, dtype=torch.float64)
    return {"image": image, "units": torch.rand(num, 3 * blocks, generator=generator, dtype=torch.float64)}


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True))


def players(built: Inpainting) -> tuple[nn.Module, nn.Module]:
    """The generator and the discriminator."""
    assert built.discriminator is not None
    return nn.ModuleList([built.backbone, built.bottleneck, built.decoder]), built.discriminator


def reference_reconstruction(filled: Tensor, images: Tensor, hole: Tensor, reach: int) -> Tensor:
    """Eq. 1 with the border, pixel by pixel."""
    terms = []
    for answer, image, missing in zip(filled, images, hole[:, 0], strict=True):
        total, num = torch.zeros((), dtype=filled.dtype), 0
        for y in range(32):
            for x in range(32):
                near = missing[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].any()
                weight = 1 if missing[y, x] else 10 if near else 0
                total = total + weight * (answer[:, y, x] - image[:, y, x]).square().sum()
                num += 3 * (weight > 0)
        terms.append(total / num)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("mask", ["centre", "random"])
def test_each_player_has_the_gradient_of_its_own_loss(tmp_path: Path, mask: str) -> None:
    built = build(tmp_path, f"method.mask={mask}")
    generator, discriminator = players(built)
    given = views()
    image, hole = given["image"], built.hole(given)
    region = F.conv2d(hole.double(), torch.ones(1, 1, 3, 3, dtype=torch.float64), padding=1) > 0
    filled = built.fill(image, hole)
    as_real = discriminator(filled * region).sigmoid()
    of_generator = 0.999 * reference_reconstruction(filled, image, hole, 1) - 0.001 * as_real.log().mean()
    real, fake = (discriminator(x * region).sigmoid() for x in (image, filled.detach()))
    of_discriminator = -(real.log() + (1 - fake).log()).mean()
    outputs = built(given)
    torch.testing.assert_close(outputs["loss"], of_generator + of_discriminator)
    for player, loss in ((generator, of_generator), (discriminator, of_discriminator)):
        torch.testing.assert_close(gradients(outputs["loss"], player), gradients(loss, player), rtol=1e-8, atol=1e-12)


def test_neither_players_loss_touches_the_others_parameters(tmp_path: Path) -> None:
    built = build(tmp_path)
    generator, discriminator = players(built)
    given = views()
    filled = built.fill(given["image"], built.hole(given))
    of_generator, of_discriminator = inpainting.adversarial_losses(discriminator, given["image"], filled)
    assert gradients(of_generator, discriminator) == [None] * len(list(discriminator.parameters()))
    assert gradients(of_discriminator, generator) == [None] * len(list(generator.parameters()))
    for loss, player in ((of_generator, generator), (of_discriminator, discriminator)):
        assert all(gradient is not None for gradient in gradients(loss, player))
    assert all(parameter.requires_grad for parameter in discriminator.parameters())


def test_gradients_are_the_slopes_of_the_losses(tmp_path: Path) -> None:
    """By finite differences along random directions, each player's part of the loss by itself."""
    built = build(tmp_path)
    given = views()
    outputs = built(given)
    parts = (lambda o: 0.999 * o["reconstruction"] + 0.001 * o["generator"], lambda o: o["discriminator"])
    for player, part in zip(players(built), parts, strict=True):
        torch.manual_seed(1)
        direction = [torch.randn_like(parameter) * 0.1 for parameter in player.parameters()]
        found = gradients(outputs["loss"], player)
        slope = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True) if g is not None)
        values = []
        for step in (1e-6, -2e-6):  # there, and back beyond the start
            with torch.no_grad():
                for parameter, d in zip(player.parameters(), direction, strict=True):
                    parameter += step * d
            values.append(float(part(built(given))))
        with torch.no_grad():
            for parameter, d in zip(player.parameters(), direction, strict=True):
                parameter += 1e-6 * d
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_without_the_adversarial_term_there_is_no_discriminator(tmp_path: Path) -> None:
    built = build(tmp_path, "method.adversarial=0")
    assert built.discriminator is None
    assert not [name for name, _ in built.named_parameters() if "discriminator" in name]
    outputs = built(views())
    assert torch.equal(outputs["loss"], outputs["reconstruction"])
    assert "generator" not in outputs


def test_the_discriminator_learns_at_a_tenth_of_the_rate(tmp_path: Path) -> None:
    built = build(tmp_path)
    rates = {name.split(".")[0]: built.rate(name, p).scale for name, p in built.named_parameters()}
    assert rates == {"backbone": 1.0, "bottleneck": 1.0, "decoder": 1.0, "discriminator": 0.1}


@pytest.mark.parametrize("mask", ["centre", "random"])
def test_the_network_does_not_see_into_the_hole(tmp_path: Path, mask: str) -> None:
    built = build(tmp_path, f"method.mask={mask}").eval()
    given = views()
    hole = built.hole(given)
    other = torch.where(hole, torch.randn_like(given["image"]), given["image"])
    assert torch.equal(built.fill(given["image"], hole), built.fill(other, hole))


def test_the_centre_hole_is_half_the_side() -> None:
    hole = inpainting.centre_hole(torch.zeros(2, 3, 32, 32))
    assert hole.shape == (2, 1, 32, 32)
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[8:24, 8:24] = True
    assert (hole == expected).all()


@pytest.mark.parametrize(("size_px", "blocks"), [(32, 1), (32, 4), (224, 4), (227, 5), (8, 20)])
def test_random_holes_take_at_most_a_quarter_of_the_image(size_px: int, blocks: int) -> None:
    units = torch.rand(200, 3 * blocks, generator=torch.Generator().manual_seed(0))
    units[0], units[1] = 0.0, 1 - 2**-24  # the least and the largest draw
    areas = inpainting.random_hole(units, size_px).double().mean((1, 2, 3))
    assert float(areas.max()) <= 0.25 or size_px**2 < 4 * blocks
    longest = max(1, math.floor(size_px / math.sqrt(4 * blocks)))
    assert float(areas.min()) >= max(1, longest // 2) ** 2 / size_px**2  # none sticks out of the image
    assert float(areas[1]) == longest**2 / size_px**2


def test_a_block_is_where_its_draws_say() -> None:
    side, top, left = 0.999, 0.5, 0.0  # of 4 blocks in 32 px: sides 4 to 8, so 8; (32 - 8 + 1) / 2 = 12.5
    hole = inpainting.random_hole(torch.tensor([[side, top, left] * 4]), 32)
    expected = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    expected[:, :, 12:20, :8] = True
    assert torch.equal(hole, expected)


def test_a_samples_hole_does_not_depend_on_its_batch() -> None:
    units = torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    together = inpainting.random_hole(units, 32)
    assert torch.equal(torch.cat([inpainting.random_hole(row[None], 32) for row in units]), together)
    assert len(together.flatten(1).unique(dim=0)) == 6


@pytest.mark.parametrize(("size_px", "reach"), [(32, 1), (128, 4), (224, 7), (227, 7)])
def test_the_border_is_seven_pixels_of_227(size_px: int, reach: int) -> None:
    images = torch.zeros(1, 3, size_px, size_px)
    hole = inpainting.centre_hole(images)
    filled = torch.where(hole, 0.0, images + 1)  # wrong by 1 everywhere outside the hole
    inner = int(hole.sum())
    border = (size_px // 2 + 2 * reach) ** 2 - inner
    found = inpainting.reconstruction_loss(filled, images, hole, inpainting.with_border(hole), 10.0)
    assert float(found) == pytest.approx(10 * border / (border + inner), rel=1e-5)


def test_psnr_of_a_known_error() -> None:
    mean, std = (torch.tensor(values)[:, None, None] for values in (augment.MEAN, augment.STD))
    images = (torch.full((2, 3, 32, 32), 0.5) - mean) / std
    filled = (torch.full((2, 3, 32, 32), 0.6) - mean) / std
    found = inpainting.psnr(filled, images, inpainting.centre_hole(images))
    assert float(found["psnr_hole"]) == pytest.approx(20, rel=1e-5)
    assert float(found["psnr_image"]) == pytest.approx(20 + 10 * math.log10(4), rel=1e-5)  # a quarter is the hole


def test_the_picture_is_the_hole_the_answer_in_it_and_the_truth(tmp_path: Path) -> None:
    built = build(tmp_path).eval()
    given = views()
    hole = built.hole(given).expand(-1, 3, -1, -1)
    with_hole, answer, truth = built.picture(given)
    assert torch.equal(truth, given["image"])
    assert (with_hole[hole] == 0).all()
    assert torch.equal(with_hole[~hole], truth[~hole])
    assert torch.equal(answer[~hole], truth[~hole])
    assert torch.equal(answer[hole], built.fill(given["image"], hole[:, :1])[hole])


def test_every_channel_of_the_bottleneck_is_a_linear_of_its_places() -> None:
    layer = inpainting.ChannelwiseLinear(3, 2, 4).double()
    x = torch.randn(5, 3, 2, 4, dtype=torch.float64)
    of_channels = [F.relu(x[:, c].flatten(1) @ layer.weight[c] + layer.bias.view(3, -1)[c]) for c in range(3)]
    expected = layer.mix(torch.stack(of_channels, dim=1).reshape(5, 3, 2, 4))
    torch.testing.assert_close(layer(x), expected)
