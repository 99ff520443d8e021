from __future__ import annotations

from typing import Any

import pytest
import torch

from distssl.nn import backbones, decoders


@pytest.mark.parametrize(("h", "w", "size_px"), [(2, 2, 32), (6, 6, 55), (7, 5, 224), (8, 8, 8)])
def test_a_decoder_reaches_any_size_from_any_map(h: int, w: int, size_px: int) -> None:
    decoder = decoders.Decoder(5, (4, 3), 2)
    sides = []
    for block in decoder.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: sides.append(tuple(output.shape[2:])))
    assert decoder(torch.randn(2, 5, h, w), size_px).shape == (2, 2, size_px, size_px)
    assert sides[0] == (round((h * size_px) ** 0.5), round((w * size_px) ** 0.5)), "by equal factors"


@pytest.mark.parametrize(
    ("name", "options", "size_px", "shape"),
    [
        ("resnet10", {"width": 8}, 64, (64, 2, 2)),
        ("alexnet", {}, 224, (256, 6, 6)),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, 32, (192, 2, 2)),
    ],
)
def test_the_shape_of_a_feature_map_is_found_without_a_trace(
    name: str, options: dict[str, Any], size_px: int, shape: tuple[int, int, int]
) -> None:
    backbone = backbones.build(name, **options)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    assert decoders.map_shape(backbone, size_px) == shape
    assert all(module.training for module in backbone.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
