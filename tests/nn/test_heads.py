from __future__ import annotations

import pytest
import torch
from torch import nn

from distssl.nn import heads


def test_a_head_is_linear_norm_relu_linear():
    head = heads.mlp([8, 16, 4])
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert head[0].bias is None
    assert head[3].bias is not None
    assert head(torch.randn(5, 8)).shape == (5, 4)


def test_simsiams_projector_ends_with_a_norm_without_parameters():
    head = heads.mlp([8, 8, 8, 8], last_norm=True, last_affine=False)
    assert [type(layer) for layer in head][-2:] == [nn.Linear, nn.BatchNorm1d]
    assert head[-2].bias is None
    assert head[-1].weight is None
    out = head(torch.randn(64, 8))
    torch.testing.assert_close(out.std(0, correction=0), torch.ones(8), rtol=1e-2, atol=1e-2)


def test_without_norms_every_linear_has_a_bias_and_two_widths_are_one_linear():
    assert [type(layer) for layer in heads.mlp([8, 8, 4], norm=False)] == [nn.Linear, nn.ReLU, nn.Linear]
    assert heads.mlp([8, 8, 4], norm=False)[0].bias is not None
    assert len(heads.mlp([8, 4])) == 1
    assert heads.mlp([8, 4], last_bias=False)[0].bias is None
    with pytest.raises(ValueError, match="two widths"):
        heads.mlp([8])


def test_cosines_are_float32_under_autocast():
    x, prototypes = torch.randn(64, 32), torch.nn.functional.normalize(torch.randn(10, 32), dim=1)
    exact = torch.nn.functional.normalize(x.double(), dim=1) @ prototypes.double().T
    with torch.autocast("cpu", torch.bfloat16):
        found = heads.cosines(x, prototypes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-6)
