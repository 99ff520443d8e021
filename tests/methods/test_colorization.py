from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import color
from torch import Tensor

from distssl import method
from distssl.data import augment
from distssl.methods import colorization
from distssl.methods.colorization import Colorization
from distssl.nn import ab_bins, lab
from tests import runs


@pytest.fixture
def built(tmp_path: Path) -> Colorization:
    found = method.build(runs.tiny(tmp_path, tmp_path, "method.name=colorization")).double()
    assert isinstance(found, Colorization)
    return found


def rgb_images(num: int = 3, seed: int = 0) -> Tensor:
    """uint8 [N, 3, 32, 32] of noise, a quarter of it grey."""
    rng = np.random.default_rng(seed)
    pixels = torch.from_numpy(rng.integers(0, 256, (num, 3, 32, 32), dtype=np.uint8))
    pixels[:, :, :16, :16] = pixels[:, :1, :16, :16]
    return pixels


def normalised(rgb: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (augment.MEAN, augment.STD))
    return (rgb.double() / 255 - mean) / std


def reference(logits: Tensor, rgb: Tensor, prior: np.ndarray) -> Tensor:
    """Eq. 2 to 4, pixel by pixel. rgb uint8 [N, 3, 32, 32], logits [N, Q, 8, 8], prior [Q] smoothed."""
    weights = 1 / (0.5 * prior + 0.5 / 313)
    weights /= (prior * weights).sum()
    centres = ab_bins.centres().numpy().astype(float)
    terms = []
    for image, scores in zip(rgb, logits, strict=True):
        ab = color.rgb2lab(image.permute(1, 2, 0).numpy())[::4, ::4, 1:]
        for y, x in np.ndindex(8, 8):
            distances = np.linalg.norm(centres - ab[y, x], axis=1)
            nearest = np.argsort(distances)[:5]
            z = np.exp(-(distances[nearest] ** 2) / (2 * 5**2))
            log_p = scores[:, y, x].log_softmax(0)
            terms.append(-weights[nearest[0]] * (torch.tensor(z / z.sum()) * log_p[nearest]).sum())
    return torch.stack(terms).mean()


def test_colorization_has_the_gradient_of_the_papers_loss(built: Colorization) -> None:
    rgb = rgb_images()
    built.counts += torch.arange(313) ** 2
    prior = built.bins.smoothed(built.counts / built.counts.sum()).numpy()
    built.eval()  # so that two passes are alike
    parameters = [*built.backbone.parameters(), *built.decoder.parameters()]
    expected = reference(built.logits(normalised(rgb)), rgb, prior)
    loss = built({"image": normalised(rgb)})["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    ours = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, parameters), rtol=1e-5, atol=1e-9)


def test_the_prior_counts_every_batch_of_a_step_once_when_the_step_is_done(built: Colorization) -> None:
    batches = [rgb_images(seed=seed) for seed in (1, 2)]
    for rgb in batches:
        built({"image": normalised(rgb)})
    assert built.counts.tolist() == [1] * 313, "weights do not move within a step"
    built.on_step_end(0.5)
    centres = ab_bins.centres().numpy()
    expected = np.ones(313, dtype=int)
    for rgb in batches:
        ab = color.rgb2lab(rgb.permute(0, 2, 3, 1).numpy())[:, ::4, ::4, 1:].reshape(-1, 1, 2)
        np.add.at(expected, np.linalg.norm(ab - centres, axis=2).argmin(1), 1)
    assert built.counts.tolist() == expected.tolist()
    built({"image": normalised(batches[0])})
    built.on_step_end(1.0)
    assert int(built.counts.sum()) == 313 + 3 * 3 * 64


def test_the_network_does_not_see_colour(built: Colorization) -> None:
    image = normalised(rgb_images())
    of_image = lab.of_normalised(image)
    without = lab.to_normalised(torch.cat([of_image[:, :1], torch.zeros_like(of_image[:, 1:])], dim=1))
    assert float((image - without).abs().max()) > 1
    built.eval()
    torch.testing.assert_close(built.logits(image), built.logits(without), rtol=0, atol=1e-4)
    evaluated = built.evaluated().eval()
    torch.testing.assert_close(evaluated(image), evaluated(without), rtol=0, atol=1e-4)


def test_what_is_evaluated_is_the_backbone_on_the_grey_image(built: Colorization) -> None:
    image = normalised(rgb_images())
    evaluated = built.evaluated().eval()
    grey = colorization.grey(image)
    assert evaluated.num_features == built.backbone.num_features
    torch.testing.assert_close(evaluated(image), built.backbone(grey))
    torch.testing.assert_close(evaluated.feature_map(image), built.backbone.feature_map(grey))
    lightness = color.rgb2lab(rgb_images().permute(0, 2, 3, 1).numpy())[..., 0]
    np.testing.assert_allclose(grey[:, 0], (lightness - 50) / 25, rtol=0, atol=1e-5)
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert set(built.state_dict()) == {name for name in built.state_dict() if not name.startswith("bins")}


def test_the_picture_is_the_grey_image_the_answer_and_the_truth(built: Colorization) -> None:
    image = normalised(rgb_images())
    torch.nn.init.zeros_(built.decoder.last.weight)
    torch.nn.init.constant_(built.decoder.last.bias, -50.0)
    red = ab_bins.centres().tolist().index([20, 10])
    with torch.no_grad():
        built.decoder.last.bias[red] = 50.0
        grey, answer, truth = map(lab.of_normalised, built.eval().picture({"image": image}))
    of_image = lab.of_normalised(image)
    torch.testing.assert_close(truth, of_image)
    torch.testing.assert_close(grey[:, 0], of_image[:, 0], rtol=0, atol=1e-3)
    assert float(grey[:, 1:].abs().max()) < 0.01
    inside = (of_image[:, 0] > 40) & (of_image[:, 0] < 60)  # where sRGB has such a red
    assert inside.any()
    for channel, value in ((1, 20.0), (2, 10.0)):
        torch.testing.assert_close(answer[:, channel][inside], torch.full_like(answer[:, 1][inside], value))
