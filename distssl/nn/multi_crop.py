"""A network on the crops of `augment.multi_crop`: one forward pass for the large ones, one for the small."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def outputs(function: Callable[[Tensor], Tensor], views: dict[str, Tensor], num_local: int) -> list[Tensor]:
    """function(images [M, 3, H, W]) -> [M, ...] of every crop: "a", "b" and the local ones, [N, ...] each."""
    found = list(function(torch.cat([views["a"], views["b"]])).chunk(2))
    if num_local:
        found += function(torch.cat([views[f"local{i}"] for i in range(num_local)])).chunk(num_local)
    return found
