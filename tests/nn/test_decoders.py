from __future__ import annotations

import pytest
import torch

from distssl.nn import decoders


@pytest.mark.parametrize(("h", "w", "size_px"), [(2, 2, 32), (6, 6, 55), (7, 5, 224), (8, 8, 8)])
def test_a_decoder_reaches_any_size_from_any_map(h: int, w: int, size_px: int) -> None:
    decoder = decoders.Decoder(5, (4, 3), 2)
    sides = []
    for block in decoder.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: sides.append(tuple(output.shape[2:])))
    assert decoder(torch.randn(2, 5, h, w), size_px).shape == (2, 2, size_px, size_px)
    assert sides[0] == (round((h * size_px) ** 0.5), round((w * size_px) ** 0.5)), "by equal factors"
