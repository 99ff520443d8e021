from __future__ import annotations

import pytest
import torch

from distssl.nn import bounds, kmeans
from tests import blobs


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("k", [3, 64, 200, 1500])
def test_passing_over_rows_gives_the_bits_of_plain_lloyd(
    monkeypatch: pytest.MonkeyPatch, k: int, offset: float
) -> None:
    monkeypatch.setattr(kmeans, "AT_ONCE", 1000)
    monkeypatch.setattr(bounds, "DENSE", 0.9)  # so that groups are scored apart, on all but the first iterations
    x = blobs.overlapping(6000, 6, sources=2 * k) + offset
    plain, skipping = (kmeans.fit(x, k, 25, init="random", skip=skip) for skip in (False, True))
    assert torch.equal(plain.labels, skipping.labels)
    assert torch.equal(plain.centroids, skipping.centroids)
    assert plain.objective == skipping.objective
    assert plain.num_iterations == skipping.num_iterations > 5
