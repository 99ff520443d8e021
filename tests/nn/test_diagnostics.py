from __future__ import annotations

import math

import pytest
import torch

from distssl.nn import diagnostics


def of(za: torch.Tensor, zb: torch.Tensor) -> dict[str, float]:
    return {name: float(value) for name, value in diagnostics.of_embeddings(za, zb).items()}


def test_orthonormal_embeddings_have_full_rank_and_their_closed_forms():
    d = 16
    z = torch.eye(d, dtype=torch.float64)
    found = of(z, z)
    assert found["effective_rank"] == pytest.approx(d, rel=1e-4)
    assert found["embedding_std"] == pytest.approx(math.sqrt((d - 1) / d))  # a column is one 1 and d - 1 zeros
    assert found["alignment"] == 0
    assert found["uniformity"] == pytest.approx(-4)  # every squared distance is 2


def test_collapsed_embeddings_have_rank_one_and_no_spread():
    z = torch.ones(32, 8, dtype=torch.float64)
    found = of(z, 3 * z)
    assert found["effective_rank"] == pytest.approx(1, abs=1e-4)
    assert found["embedding_std"] == pytest.approx(0, abs=1e-7)
    assert found["alignment"] == pytest.approx(0, abs=1e-12)
    assert found["uniformity"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rank", [2, 5])
def test_the_effective_rank_of_k_equal_singular_values_is_k(rank):
    q, _ = torch.linalg.qr(torch.randn(64, rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    basis, _ = torch.linalg.qr(torch.randn(16, rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    z = q @ basis.T
    assert of(z, z)["effective_rank"] == pytest.approx(rank, rel=1e-4)


def test_opposite_views_have_the_largest_alignment_distance():
    z = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    assert of(z, -2 * z)["alignment"] == pytest.approx(4, rel=1e-6)


def test_directions_spread_evenly_have_a_std_of_one_whatever_the_dimension():
    for d in (8, 256):
        z = torch.randn(4096, d, generator=torch.Generator().manual_seed(d))
        assert of(5 * z, 5 * z)["embedding_std"] == pytest.approx(1, abs=0.02)


def test_the_numbers_are_constants_to_autograd_and_float32_of_bf16():
    z = torch.randn(8, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = diagnostics.of_embeddings(z, z)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in found.values())


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_the_effective_rank_is_that_of_the_singular_values(shape):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(z.double())
    p = singular / singular.sum()
    found = diagnostics.effective_rank(z)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-5)
