"""What a method knows of each sample, addressed by sample id and the same on every rank: clusters, embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distssl import collectives


@dataclass(frozen=True)
class Embedded:
    """This rank's share of a dataset's features: ids int64 [n], ascending; x float [n, D]; of num_samples samples.

    Every sample that can be decoded is in the share of one rank.
    """

    ids: Tensor
    x: Tensor
    num_samples: int


class PerSample(nn.Module):
    """A row of `shape` for each sample, `fill` where there is none yet.

    How many samples there are the method's `build` does not know: the first `set` says it, or a checkpoint. Values are
    held in full on every rank, so they do not depend on which rank has which sample.
    """

    values: Tensor

    def __init__(self, *shape: int, fill: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.fill = fill
        self.register_buffer("values", torch.full((0, *shape), fill, dtype=dtype))
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def set(self, ids: Tensor, values: Tensor, num_samples: int) -> None:
        """Forget what there is, then write this rank's rows: ids int64 [n], values [n, ...], n as it likes.

        Every rank calls it; none may hold another's ids.
        """
        ids, values = of_all(ids), of_all(values.to(self.values.dtype))
        self.values = self.values.new_full((num_samples, *self.values.shape[1:]), self.fill)
        self.values[ids.to(self.values.device)] = values.to(self.values.device)

    @torch.no_grad()
    def put(self, ids: Tensor, values: Tensor) -> None:
        """Rows of this rank's batch, as many on every rank; they are kept until `turn`."""
        rows = collectives.gather_no_grad(ids), collectives.gather_no_grad(values.to(self.values.dtype))
        self._waiting.append(rows)

    @torch.no_grad()
    def turn(self) -> None:
        """Once an optimiser step: write what was put. Of a sample put twice the later row stays."""
        if not self._waiting:
            return
        ids, values = (torch.cat(part) for part in zip(*self._waiting, strict=True))
        self._waiting.clear()
        different, nth = ids.unique(return_inverse=True)
        places = torch.arange(len(ids), device=ids.device)
        last = torch.zeros_like(different).scatter_reduce_(0, nth, places, "amax")
        self.values[different] = values[last]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        stored = state_dict.get(f"{prefix}values")
        if stored is not None and stored.shape[1:] == self.values.shape[1:]:
            self.values = self.values.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def of_all(x: Tensor) -> Tensor:
    """Rows [n, ...] of all ranks in rank order, n as each likes. Not differentiable."""
    counts = collectives.gather_no_grad(torch.tensor([len(x)], device=x.device))
    padded = x.new_zeros((int(counts.max()), *x.shape[1:]))
    padded[: len(x)] = x.detach()
    parts = collectives.gather_no_grad(padded).split(len(padded)) if len(padded) else [padded] * len(counts)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])
