from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distssl.nn.assignment import Scorer


def nearest(x: Tensor, scorer: Scorer):
    return scorer.nearest(x, x.square().sum(1))


def exact(x: Tensor, c: Tensor, weights: Tensor | None = None) -> Tensor:
    """-|x - c|^2 / 2 + w in float64, [n, k]."""
    scores = torch.stack([(row.double() - c.double()).square().sum(1) / -2 for row in x])
    return scores if weights is None else scores + weights


@pytest.mark.parametrize("group", [None, 64, 256, 1024])
@pytest.mark.parametrize("k", [1, 2, 31, 64, 65, 1000, 1024, 1025, 2500])
def test_the_nearest_is_float64s_whatever_the_tiles(k: int, group: int | None) -> None:
    generator = torch.Generator().manual_seed(k)
    x, c = torch.randn(1100, 7, generator=generator), torch.randn(k, 7, generator=generator)
    assert torch.equal(nearest(x, Scorer(c, group=group)).labels, exact(x, c).argmax(1))


def test_ties_and_near_ties_go_to_float64s_nearest_and_the_lower_of_equal_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-3, 4, (3000, 4), generator=generator).float()  # distances are whole numbers: many ties
    c = torch.randint(-3, 4, (1300, 4), generator=generator).float()
    assert torch.equal(nearest(whole, Scorer(c)).labels, exact(whole, c).argmax(1))
    x = torch.randn(500, 16, generator=generator) + 50  # float32 scores are off by more than these centroids differ
    c = (50 + 1e-5 * torch.randn(40, 16, generator=generator)).float()
    assert torch.equal(nearest(x, Scorer(c)).labels, exact(x, c).argmax(1))


def test_slack_bounds_what_rounding_does() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 300, generator=generator) + 3
    c = torch.randn(50, 300, generator=generator) + 3
    scorer = Scorer(c, group=64)
    squares = x.square().sum(1)
    found = scorer.of_group(x, 0)[:, :50].double()
    true = exact(x, c) + x.double().square().sum(1, keepdim=True) / 2
    bound = scorer.slack(squares).double() / 2
    assert ((found - true).abs() <= bound[:, None]).all()
    assert bound.max() < 1e-3 * float(true.abs().max())


@pytest.mark.parametrize("k", [40, 1000, 2100])
def test_rivals_are_the_best_of_each_groups_other_centroids(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(600, 9, generator=generator), torch.randn(k, 9, generator=generator)
    scorer = Scorer(c, group=64)
    found = nearest(x, scorer)
    scores = exact(x, c) + x.double().square().sum(1, keepdim=True) / 2
    torch.testing.assert_close(found.best.double(), scores.max(1).values, atol=1e-4, rtol=1e-5)
    scores.scatter_(1, scores.argmax(1, keepdim=True), -torch.inf)
    padded = scores.new_full((600, scorer.num_groups * scorer.group), -torch.inf)
    padded[:, :k] = scores
    expected = padded.view(600, scorer.num_groups, -1).amax(2)
    sure = ~found.rivals.isinf().any(1)
    assert sure.sum() > 550
    torch.testing.assert_close(found.rivals[sure].double(), expected[sure], atol=1e-4, rtol=1e-5)


def test_weights_draw_rows_to_their_centroids() -> None:
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(400, 5, generator=generator), torch.randn(30, 5, generator=generator)
    weights = torch.randn(30, generator=generator, dtype=torch.float64)
    assert torch.equal(nearest(x, Scorer(c, weights)).labels, exact(x, c, weights).argmax(1))
