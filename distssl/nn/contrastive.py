"""NT-Xent, and the sums of exponentials of similarities that contrastive losses are made of, tile by tile.

    s_i = sum over j of w_ij exp(x_i . y_j / temperature),    x_i and y_j unit vectors

The matrix these sums run over is never held: a tile of it, and of the weights w (0 and 1: who counts as a negative), is
made, used and overwritten, and made again in the backward pass. Memory is a few copies of x and y.

Nothing is subtracted before exponentials are taken: as |x . y| <= 1, it is known whether they and their sums fit into
float32, which they do down to a temperature of about 0.014; below that the tiles are float64, and below about 0.003 a
ValueError. Losses are log1p(negatives / positive), not log(all) - log(positive), which cancels to 0, with a gradient of
0, where the positive dominates.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distssl import collectives
from distssl.nn.precision import full_precision

# Side of a tile. Measured, but a constant: it decides in which order sums are rounded, and a resumed run is to take the
# same steps to the bit. For CPUs by benchmarks/nt_xent.py --part tiles; for GPUs 64 MB a tile, not measured.
TILE = {"cpu": 576, "cuda": 4096}

LEAST_TEMPERATURE = 0.004  # float64 holds no less, whatever the number of columns

_BITS = math.log2(math.e)  # of e: powers of 2 take half the time of powers of e

Weights = Callable[[slice, slice], Sequence[Tensor]]  # rows of x, rows of y -> S tiles, float [rows, columns]


@full_precision
def nt_xent(z: Tensor, temperature: float, ring: bool = False, sizes: Sequence[int] | None = None) -> Tensor:
    """SimCLR's eq. 1 for V views of each image, [N, V, D], float, of this rank: a scalar.

        mean over anchors i and the V - 1 other views p of i's image of  -log(e^{s_ip} / (e^{s_ip} + sum_j e^{s_ij}))

    s the cosine over the temperature, j all views of all other images on all ranks: the other positives are in no
    denominator. With V = 2 this is the paper's.

    `sizes`: the N of every rank in rank order, where they differ; the mean over ranks is then still that over all
    anchors. `ring`: embeddings are passed on from rank to rank, so that none holds more than its own and two others';
    else every rank gathers all. Either way they travel once forwards and once backwards.

    Raises ValueError for one view, for sizes that are not the ranks', and for a temperature below 0.003 or so.
    """
    num_images, num_views, _ = z.shape
    sizes = [num_images] * collectives.world_size() if sizes is None else sizes
    if num_views < 2:
        raise ValueError(f"z {tuple(z.shape)} has {num_views} view of an image: [N, V, D] with V of 2 or more is right")
    if len(sizes) != collectives.world_size() or sizes[collectives.rank()] != num_images:
        raise ValueError(
            f"sizes={list(sizes)}: rank {collectives.rank()} of {collectives.world_size()} has {num_images}"
        )
    rows = [num_views * size for size in sizes]
    length = math.sqrt(_BITS / temperature)  # of embeddings whose product is the exponent of 2
    negatives, exponents = _Terms.apply(_fitting(z, temperature, sum(rows)), length, rows, ring)
    negatives, exponents = negatives.double(), exponents.double()  # [N, V], [pairs of views, N]
    total = negatives.new_zeros(())
    for pair, exponent in zip(_pairs(num_views), exponents, strict=True):
        total = total + torch.log1p(negatives[:, pair] / exponent.exp2()[:, None]).sum()
    anchors_of_a_rank = sum(rows) / collectives.world_size()
    return (total / (anchors_of_a_rank * (num_views - 1))).to(z.dtype)


def exp_sums(x: Tensor, y: Tensor, temperature: float, weights: Weights | None = None) -> Tensor:
    """s [S, n] in float64 of unit vectors x [n, D] and y [m, D], float32 or float64; a sum for each of the S weights.

    Without `weights` there is one sum, over all of y. Raises ValueError where the temperature is below 0.003 or so.
    """
    exponents = _fitting(x, temperature, len(y)) * (_BITS / temperature)
    return _Sums.apply(exponents, y.to(exponents.dtype), weights).double()


def equal(a: Tensor, b: Tensor) -> Tensor:
    """Float a [n] and b [m], whole numbers -> [n, m] of their dtype, 1 where a_i = b_j, else 0.

    Weights are made for every tile, and on a CPU this takes a fifth of the time of comparing integers into bools.
    """
    return torch.eq(a[:, None], b, out=a.new_empty(len(a), len(b)))


def different(a: Tensor, b: Tensor) -> Tensor:
    """1 - equal(a, b)."""
    return torch.ne(a[:, None], b, out=a.new_empty(len(a), len(b)))


def _fitting(x: Tensor, temperature: float, columns: int) -> Tensor:
    """`x` in a dtype that sums of `columns` exponentials of its similarities fit into."""
    bits = _BITS / temperature + math.log2(max(1, columns))
    if bits > 500:  # the ratio of two sums in float64 has twice as many
        raise ValueError(f"temperature={temperature} is too small: {LEAST_TEMPERATURE} or more is right")
    return x.double() if bits > 120 else x


class _Tiles:
    """Where the tiles of 2^(x y^T) lie, and the two buffers they and their weights are made in."""

    def __init__(self, like: Tensor, multiple: int = 1) -> None:
        side = TILE.get(like.device.type, TILE["cpu"])
        self.side, self.multiple = max(multiple, side - side % multiple), multiple
        self.buffers = [like.new_empty(0), like.new_empty(0)]

    def of(self, num_rows: int, num_columns: int) -> Iterator[tuple[slice, slice]]:
        """All tiles, at least one, be it empty; fewer rows than a side make them as much wider."""
        height = max(1, min(self.side, num_rows))
        rows, columns = _parts(0, num_rows, height), _parts(0, num_columns, self.side**2 // height)
        yield from itertools.product(rows or [slice(0, 0)], columns or [slice(0, 0)])

    def upper(self, num_rows: int) -> Iterator[tuple[slice, slice]]:
        """The square ones above the diagonal; of those on it the upper three quarters, as the lower half is waste."""
        parts = _parts(0, num_rows, self.side)
        for i, part in enumerate(parts):
            half = (self.side // self.multiple + 1) // 2 * self.multiple
            yield from itertools.combinations_with_replacement(_parts(part.start, part.stop, half), 2)
            yield from itertools.product([part], parts[i + 1 :])

    def powers(self, x: Tensor, y: Tensor) -> Tensor:
        """2^(x y^T), valid until the next."""
        return torch.mm(x, y.T, out=self._buffer(0, len(x), len(y))).exp2_()

    def outer_sum(self, of_rows: Tensor, of_columns: Tensor) -> Tensor:
        """[rows], [columns] -> [rows, columns], valid until the next."""
        out = self._buffer(1, len(of_rows), len(of_columns))
        return torch.add(of_rows[:, None], of_columns, out=out)

    def _buffer(self, which: int, num_rows: int, num_columns: int) -> Tensor:
        size = num_rows * num_columns
        if self.buffers[which].numel() < size:
            self.buffers[which] = self.buffers[which].new_empty(size)
        return self.buffers[which][:size].view(num_rows, num_columns)


class _Sums(torch.autograd.Function):
    """x [n, D], y [m, D] -> [S, n], the sums over j of w_ij 2^(x_i . y_j)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weights: Weights | None) -> Tensor:
        sums: list[Tensor] = []
        tiles = _Tiles(x)
        for a, b in tiles.of(len(x), len(y)):
            powers = tiles.powers(x[a], y[b])
            parts = [powers.sum(1)] if weights is None else [(powers * w).sum(1) for w in weights(a, b)]
            sums = sums or [x.new_zeros(len(x)) for _ in parts]
            for whole, part in zip(sums, parts, strict=True):
                whole[a] += part
        ctx.save_for_backward(x, y)
        ctx.weights = weights
        return torch.stack(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y = ctx.saved_tensors
        dx, dy = (
            torch.zeros_like(v) if needed else None for v, needed in zip((x, y), ctx.needs_input_grad, strict=False)
        )
        grad = grad * math.log(2)
        tiles = _Tiles(x)
        for a, b in tiles.of(len(x), len(y)):
            powers = tiles.powers(x[a], y[b])
            of_rows = grad[:, a, None]  # [S, rows, 1]
            if ctx.weights is not None:
                of_rows = [g * w for g, w in zip(of_rows, ctx.weights(a, b), strict=True)]
            powers.mul_(functools.reduce(torch.add, of_rows))
            if dx is not None:
                dx[a].addmm_(powers, y[b])
            if dy is not None:
                dy[b].addmm_(powers.T, x[a])
        return dx, dy, None


class _Terms(torch.autograd.Function):
    """[N, V, D], brought to `length` as z -> the sums of 2^(z_i . z_j) over j of other images on all ranks, [N, V], and
    z_i . z_p of an image's pairs of views, [pairs, N].

    `rows`: N V of every rank. The matrix is symmetric: of this rank's own block only the upper half is made. With
    another rank's rows z_i has the same powers as an anchor and as their negative, there weighed by their sums'
    gradients. So these are what ranks tell each other, a number a row; no gradient of size D travels.
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor, length: float, rows: Sequence[int], ring: bool) -> tuple[Tensor, Tensor]:
        num_views = raw.shape[1]
        factors = length / raw.norm(dim=2, keepdim=True).clamp_min(1e-12)  # [N, V, 1]
        views = raw * factors
        z = views.flatten(0, 1)
        sums = z.new_zeros(len(z))
        tiles = _Tiles(z, num_views)
        for a, b in tiles.upper(len(z)):
            powers = _without_own_image(tiles.powers(z[a], z[b]), a == b, num_views)
            sums[a] += powers.sum(1)
            if a != b:
                sums[b] += powers.sum(0)
        for block in _of_other_ranks(z, rows, ring):
            for a, b in tiles.of(len(z), len(block)):
                sums[a] += tiles.powers(z[a], block[b]).sum(1)
        ctx.save_for_backward(views, factors)
        ctx.options = length, rows, ring
        return sums.view(-1, num_views), torch.stack([(views[:, u] * views[:, v]).sum(1) for u, v in _pairs(num_views)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sums: Tensor, of_exponents: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        views, factors = ctx.saved_tensors
        length, rows, ring = ctx.options
        dviews = torch.zeros_like(views)
        for (u, v), grad in zip(_pairs(views.shape[1]), of_exponents, strict=True):
            # z_v alone would pull z_u alike, but for a part along z_u that cancels below. The difference of near views
            # is exact: errors of saturated positives fall from 9e-6 to 2e-6.
            pull = (views[:, v] - views[:, u]).mul_(grad[:, None])
            dviews[:, u] += pull
            dviews[:, v] -= pull
        z, dz, grad = views.flatten(0, 1), dviews.flatten(0, 1), of_sums.flatten() * math.log(2)
        tiles = _Tiles(z, views.shape[1])
        for a, b in tiles.upper(len(z)):
            powers = _without_own_image(tiles.powers(z[a], z[b]), a == b, views.shape[1])
            powers.mul_(tiles.outer_sum(grad[a], grad[b]))
            dz[a].addmm_(powers, z[b])
            if a != b:
                dz[b].addmm_(powers.T, z[a])
        others = zip(_of_other_ranks(z, rows, ring), _of_other_ranks(grad, rows, ring), strict=True)
        for block, of_block in others:
            for a, b in tiles.of(len(z), len(block)):
                powers = tiles.powers(z[a], block[b]).mul_(tiles.outer_sum(grad[a], of_block[b]))
                dz[a].addmm_(powers, block[b])
        along = (dviews * views).sum(2, keepdim=True) / length**2  # what would change the length has no effect
        return dviews.addcmul_(views, along, value=-1).mul_(factors), None, None, None


def _pairs(num_views: int) -> list[list[int]]:
    return [[u, v] for u, v in itertools.combinations(range(num_views), 2)]


def _parts(start: int, stop: int, length: int) -> list[slice]:
    return [slice(i, min(i + length, stop)) for i in range(start, stop, length)]


def _without_own_image(powers: Tensor, on_diagonal: bool, num_views: int) -> Tensor:
    if not on_diagonal:
        return powers
    of_images = powers.unflatten(1, (-1, num_views)).unflatten(0, (-1, num_views))  # a tile begins with a first view
    of_images.diagonal(dim1=0, dim2=2).zero_()  # [V, V, images]
    return powers


def _of_other_ranks(x: Tensor, rows: Sequence[int], ring: bool) -> Iterator[Tensor]:
    """`x` [rows of that rank, ...] of every other rank in turn: passed along, or out of one gathered tensor."""
    rank, size = collectives.rank(), len(rows)
    if ring:
        for step in range(1, size):
            x = collectives.rotate(x, rows[(rank - step) % size])
            yield x
    elif size > 1:
        filled = torch.cat([x, x.new_zeros(max(rows) - len(x), *x.shape[1:])])
        for other, block in enumerate(collectives.gather_no_grad(filled).split(max(rows))):
            if other != rank:
                yield block[: rows[other]]
