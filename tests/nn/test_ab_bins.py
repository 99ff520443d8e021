from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distssl.nn import ab_bins, lab

# What the authors publish (their pts_in_hull.npy), as the least and the largest b of each a.
PUBLISHED = {
    **{-90: (50, 90), -80: (20, 90), -70: (0, 90), -60: (-20, 90), -50: (-30, 100), -40: (-40, 100), -30: (-50, 100)},
    **{-20: (-50, 100), -10: (-60, 100), 0: (-70, 100), 10: (-80, 90), 20: (-80, 90), 30: (-90, 90), 40: (-100, 90)},
    **{50: (-100, 80), 60: (-110, 80), 70: (-110, 80), 80: (-110, 70), 90: (-110, 70), 100: (-90, 0)},
}


@pytest.fixture(scope="module")
def bins() -> ab_bins.Bins:
    return ab_bins.Bins()


def cube(steps: int) -> Tensor:
    """ab of steps^3 colours of the RGB cube, float64 [1, 2, 1, steps^3]."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return lab.of_rgb(torch.cartesian_prod(ramp, ramp, ramp).T[None, :, None])[:, 1:]


def dense(numbers: Tensor, weights: Tensor) -> Tensor:
    """[N, 5, h, w] each -> [N, Q, h, w]."""
    n, _, h, w = numbers.shape
    return weights.new_zeros(n, 313, h, w).scatter_add_(1, numbers, weights)


def reference_encoding(ab: Tensor) -> Tensor:
    """Section 2.1 by distances to all bins: [N, 2, h, w] -> [N, Q, h, w]."""
    centres = ab_bins.centres().to(ab.dtype)
    squares = (ab[:, None] - centres[None, :, :, None, None]).square().sum(2)  # [N, Q, h, w]
    z = torch.exp(-squares / (2 * 5.0**2))
    z[squares > squares.kthvalue(5, dim=1, keepdim=True).values] = 0
    return z / z.sum(1, keepdim=True)


def test_the_bins_are_the_published_313() -> None:
    published = [[a, b] for a, (low, high) in PUBLISHED.items() for b in range(low, high + 1, 10)]
    assert len(published) == 313
    assert ab_bins.centres().tolist() == published


def test_every_colour_lies_between_four_bins() -> None:
    """Which `encode` relies on, and which shows that the cube's edges are enough to find its hull."""
    cells = (cube(64) / 10).floor()[0, :, 0].T.unique(dim=0)
    known = {tuple(centre) for centre in ab_bins.centres().tolist()}
    corners = {(10 * (a + i), 10 * (b + j)) for a, b in cells.tolist() for i in (0, 1) for j in (0, 1)}
    assert corners <= known


def test_encoding_finds_the_five_nearest_of_all_bins(bins: ab_bins.Bins) -> None:
    ab = cube(33)
    numbers, weights = bins.encode(ab)
    torch.testing.assert_close(dense(numbers, weights), reference_encoding(ab), rtol=0, atol=1e-12)
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]), rtol=0, atol=1e-12)
    assert (weights.diff(dim=1) <= 0).all(), "nearest first"


def test_grey_is_spread_over_its_bin_and_the_four_beside_it(bins: ab_bins.Bins) -> None:
    numbers, weights = bins.encode(torch.zeros(1, 2, 1, 1))
    side = math.exp(-2) / (1 + 4 * math.exp(-2))  # 10 away, sigma 5
    torch.testing.assert_close(weights.flatten(), torch.tensor([1 - 4 * side, side, side, side, side]))
    assert bins.centres[numbers[0, 0, 0, 0]].tolist() == [0, 0]
    assert bins.centres[numbers.flatten()[1:]].norm(dim=1).tolist() == [10] * 4


def test_counting_is_a_histogram(bins: ab_bins.Bins) -> None:
    nearest = torch.tensor([[[3, 3], [312, 0]], [[3, 7], [7, 0]]])
    expected = {0: 2, 3: 3, 7: 2, 312: 1}
    assert {q: int(n) for q, n in enumerate(bins.count(nearest)) if n} == expected


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0])
def test_rebalancing_is_eq_4_and_its_expectation_is_one(bins: ab_bins.Bins, uniform: float) -> None:
    counts = torch.randint(1, 10**6, (313,), generator=torch.Generator().manual_seed(0)) ** 2
    frequencies = (counts.double() / counts.sum()).tolist()
    points = ab_bins.centres().tolist()
    prior = [0.0] * 313
    for share, (a, b) in zip(frequencies, points, strict=True):
        kernel = [math.exp(-((a - x) ** 2 + (b - y) ** 2) / 50) for x, y in points]
        for q, value in enumerate(kernel):
            prior[q] += share * value / sum(kernel)
    raw = [1 / ((1 - uniform) * p + uniform / 313) for p in prior]
    scale = sum(p * w for p, w in zip(prior, raw, strict=True))
    weights = bins.rebalancing(counts, uniform)
    torch.testing.assert_close(weights, torch.tensor(raw, dtype=torch.float64) / scale, rtol=1e-9, atol=0)
    assert float((torch.tensor(prior, dtype=torch.float64) * weights).sum()) == pytest.approx(1)
    if uniform == 1:
        torch.testing.assert_close(weights, torch.ones_like(weights))


def test_the_annealed_mean_goes_from_the_mean_to_the_mode(bins: ab_bins.Bins) -> None:
    logits = torch.randn(2, 313, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    centres = bins.centres.double()
    p = logits.softmax(1)
    mean = (p[:, :, None] * centres[None, :, :, None, None]).sum(1)  # [N, 2, h, w]
    torch.testing.assert_close(bins.annealed_mean(logits, 1.0), mean)
    mode = centres[logits.argmax(1)].permute(0, 3, 1, 2)
    torch.testing.assert_close(bins.annealed_mean(logits, 1e-4), mode)
    sharpened = p ** (1 / 0.38) / (p ** (1 / 0.38)).sum(1, keepdim=True)  # eq. 5
    expected = (sharpened[:, :, None] * centres[None, :, :, None, None]).sum(1)
    torch.testing.assert_close(bins.annealed_mean(logits, 0.38), expected)


def test_the_loss_is_eq_2_with_dense_targets(bins: ab_bins.Bins) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(12**3, generator=generator)[:24]
    ab = cube(12)[0, :, 0, chosen].reshape(2, 2, 3, 4).transpose(0, 1)
    logits = torch.randn(2, 313, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(313, generator=generator, dtype=torch.float64)
    ours = ab_bins.rebalanced_cross_entropy(logits, *bins.encode(ab), weights)
    z = reference_encoding(ab)
    of_pixels = -weights[z.argmax(1)] * (z * logits.softmax(1).log()).sum(1)
    torch.testing.assert_close(ours, of_pixels.mean())
    (ours_gradient,) = torch.autograd.grad(ours, logits)
    (gradient,) = torch.autograd.grad(of_pixels.mean(), logits)
    torch.testing.assert_close(ours_gradient, gradient)
