"""Where k-means starts: rows drawn by a hash of (seed, row id), the same ones however rows are spread over ranks.

"random": the k rows with the smallest hash, which is a uniform draw without replacement.

"k-means++": each next centroid is a row drawn with probability proportional to its squared distance from the nearest
one so far (Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, SODA 2007, section 2.2,
http://ilpubs.stanford.edu/778/). Of weights w the row with the smallest -log(u) / w is such a draw, u a uniform of
(seed, number of the centroid, row id). Deviation: it draws from at most max(4 k, 4096) rows, picked as "random" does,
which every rank then holds; k passes over all of them would cost more than the clustering.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distssl import collectives
from distssl.data import draws
from distssl.nn.rows import Rows

STARTS = ("k-means++", "random")
_PICK, _PLUS_PLUS = 1, 2


def draw(name: str, rows: Rows, ids: np.ndarray, k: int, seed: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Centroids [k, D], the same on every rank. ids: int64 [N] of this rank's rows; all ranks have k rows or more."""
    if name == "random":
        return _pick(rows, ids, k, seed, dim, dtype)[0]
    return plus_plus(*_pick(rows, ids, max(4 * k, 4096), seed, dim, dtype), k, seed)


def _pick(rows: Rows, ids: np.ndarray, num: int, seed: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, np.ndarray]:
    """The `num` rows with the smallest hash (all, where there are fewer), in its order: [num, D], ids int64 [num]."""
    keys = draws.hash64(seed, _PICK, ids)
    mine = np.lexsort((ids, keys))[:num]
    found = collectives.gather_objects((keys[mine], ids[mine]))
    all_keys, all_ids = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.lexsort((all_ids, all_keys))[:num]
    before = sum(len(part[0]) for part in found[: collectives.rank()])
    places = np.nonzero((order >= before) & (order < before + len(mine)))[0]  # of this rank's rows among the picked
    own = rows.take(torch.from_numpy(mine[order[places] - before]), dim, dtype)
    picked = torch.zeros(len(order), dim, dtype=dtype, device=own.device)
    picked[torch.from_numpy(places).to(own.device)] = own.to(dtype)
    return collectives.sum_(picked), all_ids[order]


def plus_plus(x: Tensor, ids: np.ndarray, k: int, seed: int) -> Tensor:
    """k of the rows x [n, D], n >= k, drawn as k-means++; ids: int64 [n], which the draws are keyed by."""
    # About the mean: a squared distance loses its digits where rows are long and close together.
    centred = (x.double() - x.double().mean(0)).to(x.dtype)
    squares = torch.linalg.vecdot(centred, centred)
    # What rounding makes of the distance between equal rows counts as none.
    nothing = 8 * torch.finfo(x.dtype).eps * squares
    chosen: list[int] = []
    free = np.ones(len(x), dtype=bool)
    nearest = torch.full_like(squares, torch.inf)
    for number in range(k):
        bits = draws.hash64(seed, _PLUS_PLUS, number, ids) >> np.uint64(11)
        race = -np.log((bits + 0.5) * 2.0**-53)  # float64 [n], exponential
        if number:
            weights = nearest.double().cpu().numpy() * free
            # Where every row is on a centroid the rest are drawn uniformly.
            race = np.divide(race, weights, out=np.full(len(x), np.inf), where=weights > 0) if weights.any() else race
        race[~free] = np.inf
        row = int(race.argmin())
        chosen.append(row)
        free[row] = False
        distance = squares + squares[row] - 2 * (centred @ centred[row])
        distance[distance <= nothing + nothing[row]] = 0
        nearest = torch.minimum(nearest, distance)
    return x[collectives.broadcast_object(chosen)]  # of rank 0, should ranks' machines round differently
