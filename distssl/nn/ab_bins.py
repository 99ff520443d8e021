"""Colours as classes: the plane of Lab's a and b in bins of side 10, as Zhang, Isola and Efros cut it.

Colorful Image Colorization, ECCV 2016, section 2.1 and 2.2, https://arxiv.org/abs/1603.08511.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from distssl.nn import lab
from distssl.nn.precision import full_precision

GRID = 10
NEAREST = 5  # bins a colour is spread over
SIGMA = 5.0  # of the Gaussians over ab, that of the encoding and that of the prior
_REACH = 13  # the lattice goes from -130 to 130: every bin and the neighbours a colour is compared with


class Bins(nn.Module):
    """The Q = 313 bins, colours to bins and back. It has no state: its buffers are constants."""

    centres: Tensor
    lattice: Tensor
    around: Tensor

    def __init__(self) -> None:
        super().__init__()
        found = centres()
        self.register_buffer("centres", found.clone(), persistent=False)  # [Q, 2]
        numbers = torch.full((2 * _REACH + 1,) * 2, -1)
        a, b = (found / GRID).long().T + _REACH
        numbers[a, b] = torch.arange(len(found))
        self.register_buffer("lattice", numbers, persistent=False)  # the bin at a place of the grid, -1 for none
        # A colour's five nearest bins are among the 4 x 4 places around its cell (tested over the whole gamut): the
        # cell's corners are always bins. That is 16 distances in place of 313.
        around = torch.cartesian_prod(torch.arange(-1, 3), torch.arange(-1, 3))
        self.register_buffer("around", around, persistent=False)  # [16, 2]

    def __len__(self) -> int:
        return len(self.centres)

    @torch.no_grad()
    def encode(self, ab: Tensor) -> tuple[Tensor, Tensor]:
        """Colours [N, 2, h, w] of sRGB -> their 5 nearest bins, int64 [N, 5, h, w], nearest first, and the weights.

        Weights [N, 5, h, w] are Gaussian in the distance and sum to 1: section 2.1's soft encoding without its zeros.
        """
        colours = ab.permute(0, 2, 3, 1)[..., None, :]  # [N, h, w, 1, 2]
        places = (colours / GRID).floor().long() + self.around  # [N, h, w, 16, 2]
        numbers = self.lattice[places[..., 0] + _REACH, places[..., 1] + _REACH]  # [N, h, w, 16]
        squares = (places * GRID - colours).square().sum(-1).masked_fill(numbers < 0, torch.inf)
        squares, chosen = squares.topk(NEAREST, largest=False)  # [N, h, w, 5]
        weights = (-squares / (2 * SIGMA**2)).softmax(-1)
        return numbers.gather(-1, chosen).permute(0, 3, 1, 2), weights.permute(0, 3, 1, 2)

    def count(self, nearest: Tensor) -> Tensor:
        """Bins int64 [N, h, w] -> how often each occurs, int64 [Q]."""
        return nearest.new_zeros(len(self)).index_add_(0, nearest.flatten(), torch.ones_like(nearest).flatten())

    def rebalancing(self, counts: Tensor, uniform: float) -> Tensor:
        """The loss's weight for each bin, float64 [Q], from how often it occurs, int64 [Q]; its expectation is 1.

        w is proportional to 1 / ((1 - uniform) p + uniform / Q), p the smoothed frequencies; eq. 4.
        """
        prior = self.smoothed(counts.double() / counts.sum())
        weights = 1 / ((1 - uniform) * prior + uniform / len(self))
        return weights / (prior * weights).sum()

    def smoothed(self, frequencies: Tensor) -> Tensor:
        """Each bin's frequency spread over all by a Gaussian in ab: [Q] -> [Q], float64, of the same sum."""
        points = self.centres.double()
        kernel = (-(points[:, None] - points).square().sum(-1) / (2 * SIGMA**2)).exp()  # [Q, Q]
        return (kernel / kernel.sum(0) * frequencies).sum(1)

    @full_precision
    def annealed_mean(self, logits: Tensor, temperature: float) -> Tensor:
        """Logits [N, Q, h, w] -> ab [N, 2, h, w]: the mean of softmax(logits / temperature); section 2.3, eq. 5.

        Between the mean of the predicted distribution (temperature 1) and its mode (towards 0).
        """
        probabilities = (logits / temperature).softmax(1)
        return torch.einsum("nqhw,qc->nchw", probabilities, self.centres.to(logits.dtype))


@full_precision
def rebalanced_cross_entropy(logits: Tensor, bins: Tensor, soft: Tensor, weights: Tensor) -> Tensor:
    """-mean over pixels of weights[nearest bin] * sum_q soft_q log softmax(logits)_q; eq. 2, a scalar.

    logits [N, Q, h, w]; bins int64 and soft [N, 5, h, w] as `Bins.encode` gives them; weights [Q]. The mean is over a
    number of pixels, not over their weights, which would differ between ranks.
    """
    log_probability = (logits.gather(1, bins) * soft).sum(1) - logits.logsumexp(1)  # [N, h, w]
    return -(weights.to(logits.dtype)[bins[:, 0]] * log_probability).mean()


@functools.cache
def centres() -> Tensor:
    """The bins that are in gamut: float32 [313, 2], by a, then b.

    They are the corners of all the cells of the grid that meet the convex hull of sRGB's colours in the ab plane; with
    this rule they are the published 313, each of them. The hull is that of the colours on the RGB cube's twelve edges.
    """
    hull = _convex_hull(_edges())  # [V, 2], against the clock
    side = hull.roll(-1, 0) - hull
    normals = torch.stack([side[:, 1], -side[:, 0]], dim=1)  # outwards
    axes = torch.cat([normals, torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=hull.dtype)])  # [V + 4, 2]
    steps = torch.arange(-_REACH, _REACH + 1) * GRID
    grid = torch.cartesian_prod(steps, steps).to(hull.dtype)  # [G, 2]
    # The square of the four cells around a grid point meets the hull unless a line along a side of either parts them.
    gap = grid @ axes.T - GRID * axes.abs().sum(1) - (hull @ axes.T).amax(0)  # [G, V + 4]
    return grid[(gap < 0).all(1)].float()


def _edges() -> Tensor:
    """ab of the colours on the edges of the RGB cube, float64 [12 * 256, 2]."""
    ramp = torch.linspace(0, 1, 256, dtype=torch.float64)
    ends = torch.cartesian_prod(torch.arange(2), torch.arange(2)).to(ramp.dtype)  # [4, 2]
    held = ends[:, None].expand(4, 256, 2)
    edges = [torch.cat([held[..., :i], ramp.expand(4, 256)[..., None], held[..., i:]], dim=-1) for i in range(3)]
    return lab.of_rgb(torch.cat(edges).permute(2, 0, 1))[1:].flatten(1).T  # [3, 12, 256] -> [3072, 2]


def _convex_hull(points: Tensor) -> Tensor:
    """The corners of the convex hull of points [M, 2], against the clock: Andrew's monotone chain (1979)."""
    ordered = sorted(set(map(tuple, points.tolist())))

    def chain(sequence: list[tuple[float, ...]]) -> list[tuple[float, ...]]:
        kept: list[tuple[float, ...]] = []
        for x, y in sequence:
            while len(kept) > 1:
                (x0, y0), (x1, y1) = kept[-2:]
                if (x1 - x0) * (y - y0) > (y1 - y0) * (x - x0):  # a turn to the left
                    break
                kept.pop()
            kept.append((x, y))
        return kept[:-1]

    return torch.tensor(chain(ordered) + chain(ordered[::-1]), dtype=points.dtype)
