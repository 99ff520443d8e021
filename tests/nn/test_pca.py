from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distssl import collectives
from distssl.nn.pca import Whitening


def rows(num: int = 200, dim: int = 12) -> Tensor:
    """Correlated, far from the origin, drifting along the rows so that ranks' parts differ; float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num, dim)) @ rng.normal(size=(dim, dim)) + 5 + np.linspace(-2, 2, num)[:, None]
    return torch.from_numpy(x)


def reference(x: np.ndarray, num: int) -> np.ndarray:
    """PCA-whitening by numpy's SVD: other algebra than an eigendecomposition of the covariance. Up to signs."""
    centred = x - x.mean(0)
    left, _, _ = np.linalg.svd(centred, full_matrices=False)
    return left[:, :num] * np.sqrt(len(x))


def whitened(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    rank, world_size = collectives.rank(), collectives.world_size()
    cut = len(x) // 3  # unequal parts
    mine = x if world_size == 1 else (x[:cut], x[cut:])[rank]
    fitted = Whitening(x.shape[1], 5).to(x.dtype)
    assert fitted.fit(mine) == 0
    return fitted(x), fitted.state_dict()


def test_whitening_is_that_of_numpys_svd() -> None:
    x = rows()
    ours, expected = whitened(x)[0].numpy(), reference(x.numpy(), 5)
    signs = np.sign((ours * expected).sum(0))
    np.testing.assert_allclose(ours, expected * signs, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(ours.T @ ours / len(x), np.eye(5), atol=1e-10)


def test_float32_rows_far_from_the_origin_keep_their_digits() -> None:
    x = (rows() + 1000).float()
    ours, expected = whitened(x)[0].double().numpy(), reference(x.double().numpy(), 5)
    signs = np.sign((ours * expected).sum(0))
    np.testing.assert_allclose(ours, expected * signs, atol=2e-3)


def test_ranks_with_parts_of_the_rows_find_what_one_finds_in_all(ranks) -> None:
    x = rows()
    expected, state = whitened(x)
    for ours, of_rank in ranks(2).run(whitened, x):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(of_rank, state, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("num", [4, 200])
def test_directions_without_variance_are_zero_and_not_noise(num: int) -> None:
    flat = rows(num, 3) @ torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fitted = Whitening(8, 6).double()
    left_out = fitted.fit(flat)
    assert left_out == 3  # rank three, four rows or more
    y = fitted(flat)
    assert (y[:, 3:] == 0).all()
    torch.testing.assert_close(y[:, :3].T @ y[:, :3] / num, torch.eye(3, dtype=torch.float64), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_are_named_though_rounding_makes_them_differ(dtype: torch.dtype) -> None:
    noise = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    constant = torch.full((64, 8), 3.7, dtype=dtype) * (1 + noise * torch.finfo(dtype).eps)
    for x in (constant, torch.zeros(64, 8, dtype=dtype)):
        with pytest.raises(ValueError, match="constant features"):
            Whitening(8, 4).to(dtype).fit(x)


def test_features_that_are_not_finite_are_named() -> None:
    x = rows()
    x[7, 3] = torch.nan
    with pytest.raises(ValueError, match="features are NaN or infinite"):
        Whitening(12, 4).fit(x)
