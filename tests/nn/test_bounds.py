from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distssl.nn import bounds, kmeans


def problem(rows: int, dim: int, sources: int, noise: float = 0.6, seed: int = 0) -> Tensor:
    """Blobs that overlap, float32 [rows, dim], in an order: what one rank holds looks unlike what the next does."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(sources, dim, generator=generator)
    blob = torch.randint(sources, (rows,), generator=generator).sort().values
    return means[blob] + noise * torch.randn(rows, dim, generator=generator)


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("k", [3, 64, 200, 1500])
def test_passing_over_rows_gives_the_bits_of_plain_lloyd(
    monkeypatch: pytest.MonkeyPatch, k: int, offset: float
) -> None:
    monkeypatch.setattr(kmeans, "AT_ONCE", 1000)
    monkeypatch.setattr(bounds, "DENSE", 0.9)  # so that groups are scored apart, on all but the first iterations
    x = problem(6000, 6, sources=2 * k) + offset
    plain, skipping = (kmeans.fit(x, k, 25, init="random", skip=skip) for skip in (False, True))
    assert torch.equal(plain.labels, skipping.labels)
    assert torch.equal(plain.centroids, skipping.centroids)
    assert plain.objective == skipping.objective
    assert plain.num_iterations == skipping.num_iterations > 5
