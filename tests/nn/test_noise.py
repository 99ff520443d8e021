"""Counter-based normal noise: the hash is the draws', the numbers are normal and independent, rows are their own."""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats

from distssl.data import draws
from distssl.nn import noise


def seeds(num: int) -> torch.Tensor:
    return torch.stack([torch.arange(num), torch.arange(num) // 3], dim=1)


def test_the_hash_is_that_of_the_draws_bit_by_bit() -> None:
    words = [torch.tensor([0, 1, -1, 2**62, -(2**63)]), torch.tensor(7), torch.arange(5)]
    expected = draws.hash64(*(word.numpy() for word in words)).view(np.int64)
    assert np.array_equal(noise.hash64(*words).numpy(), expected)


def test_noise_is_normal() -> None:
    x = noise.normal(seeds(40), (5, 1001)).double().flatten()
    assert len(x) == 200_200
    assert abs(x.mean()) < 4 / len(x) ** 0.5
    assert abs(x.var() - 1) < 4 * (2 / len(x)) ** 0.5
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    assert 4 < x.abs().max() < 4.4


def test_numbers_are_independent_within_a_sample_and_between_samples_of_near_seeds() -> None:
    x = noise.normal(seeds(60), (4000,)).double()
    limit = 5 / 4000**0.5
    between = torch.corrcoef(x) - torch.eye(60, dtype=torch.float64)
    assert between.abs().max() < limit
    for lag in (1, 2, 3, 4, 64):  # four numbers share a hash, 1000 positions apart or side by side
        assert abs((x[:, lag:] * x[:, :-lag]).mean()) < 5 / x[:, lag:].numel() ** 0.5
        assert abs((x[:, lag:].square() * x[:, :-lag].square()).mean() - 1) < 15 / x[:, lag:].numel() ** 0.5


def test_a_samples_noise_is_the_same_bits_in_any_batch() -> None:
    all_seeds = seeds(17)
    together = noise.normal(all_seeds, (3, 7, 5))
    assert together.dtype == torch.float32
    for i in range(17):
        assert torch.equal(noise.normal(all_seeds[i : i + 1], (3, 7, 5))[0], together[i])
    assert torch.equal(noise.normal(all_seeds.flip(0).int(), (3, 7, 5)).flip(0), together)
    assert torch.equal(noise.normal(all_seeds, (3,)), together.flatten(1)[:, :3])


def test_each_word_of_a_seed_counts() -> None:
    a, b, c = noise.normal(torch.tensor([[1, 2], [1, 3], [2, 2]]), (100,))
    assert not (a == b).any() or (a == b).float().mean() < 0.1
    assert (a == c).float().mean() < 0.1
