"""Lloyd's assignment that passes over what cannot have changed: exact, with bounds on distances for each row.

A row keeps an upper bound on the distance to its own centroid and, for each group of centroids, a lower bound on the
distance to the nearest other one. When centroids move, the upper bound grows by its own centroid's step, the lower ones
shrink by their group's largest; groups whose lower bound stays above the upper one are left out. Bounds are widened by
what rounding can do, and rows they do not decide go through `Scorer.nearest`, so labels are those of plain Lloyd, bit
for bit.

Ding, Zhao, Shen, Musuvathi and Mytkowicz, Yinyang K-Means, ICML 2015,
https://proceedings.mlr.press/v37/ding15.html; with one group it is Hamerly's algorithm (SDM 2010). Deviation: groups
are consecutive centroids and not clusters of centroids, which passed over as many (measured) and are read in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distssl.nn.assignment import GROUP, TILE, Nearest, Scorer

BYTES = 256 * 2**20  # for the lower bounds of a rank's rows
# Above this share of (row, group) pairs left, all groups of the row are scored at once: picking rows costs as much as
# the product it saves.
DENSE = 0.35
HOPELESS = 0.95  # and above this, with upper bounds as they are, they are not sharpened


def group_size(num_rows: int, num_clusters: int, itemsize: int) -> int:
    """The smallest group for which the bounds of `num_rows` rows fit into BYTES, and TILE where none does."""
    group = GROUP
    while group < TILE and num_rows * itemsize * -(-num_clusters // group) > BYTES:
        group *= 2
    return group


class Bounds:
    """The bounds of one rank's rows, in their order. The first assignment of a row must be with steps of infinity."""

    def __init__(self, num_rows: int, scorer: Scorer) -> None:
        like = scorer.centroids
        self.upper = like.new_zeros(num_rows)
        self.lower = like.new_zeros(num_rows, scorer.num_groups)
        self.picked = like.new_empty(0, scorer.dim)
        self.num_scored = 0  # (row, centroid) pairs, of all that plain Lloyd would have scored

    def assign(self, rows: slice, x: Tensor, squares: Tensor, labels: Tensor, scorer: Scorer, steps: Tensor) -> Tensor:
        """New labels int64 [n] of x [n, D], which are the rows `rows` and had `labels`.

        steps [k]: how far each centroid moved since, rounded up.
        """
        lower, upper = self.lower[rows], self.upper[rows]
        widest = _by_group(steps, scorer)  # [groups]
        shrink = 1 - 2 * torch.finfo(x.dtype).eps
        lower.sub_(widest).mul_(shrink)
        upper.add_(steps[labels]).div_(shrink)
        open_ = (lower.amin(1) <= upper).nonzero()[:, 0]
        if not len(open_):
            return labels
        labels = labels.clone()
        if len(open_) == len(x):
            self._assign_open(lower, upper, x, squares, labels, scorer)
            return labels
        parts = lower[open_], upper[open_], labels[open_]
        self._assign_open(parts[0], parts[1], x.index_select(0, open_), squares[open_], parts[2], scorer)
        lower[open_], upper[open_], labels[open_] = parts
        return labels

    def _assign_open(
        self, lower: Tensor, upper: Tensor, x: Tensor, squares: Tensor, labels: Tensor, scorer: Scorer
    ) -> None:
        """As `assign`, for rows that are not decided yet; writes lower, upper and labels in place."""
        # Counted before own distances are, which only those rows need that are not scored at all.
        if (lower <= upper[:, None]).count_nonzero() > HOPELESS * lower.numel():
            self._assign_all(lower, upper, x, squares, labels, scorer)
            return
        own = self._own(x, labels, scorer)
        upper.copy_(_upper(squares, own, scorer))
        need = lower <= upper[:, None]  # [n, groups]
        if need.count_nonzero() > DENSE * need.numel():
            self._assign_all(lower, upper, x, squares, labels, scorer)
            return
        best = x.new_full(need.shape, -torch.inf)  # of each group's other centroids
        for number in range(scorer.num_groups):
            picked = need[:, number].nonzero()[:, 0]
            if len(picked):
                best[picked, number] = self._score_group(self._pick(x, picked), labels[picked], scorer, number)
        torch.where(need, _lower(squares[:, None], best, scorer), lower, out=lower)
        best_other = best.amax(1)
        unclear = (best_other >= own - scorer.slack(squares)).nonzero()[:, 0]
        if len(unclear):
            parts = lower[unclear], upper[unclear], labels[unclear]
            self._assign_all(parts[0], parts[1], self._pick(x, unclear), squares[unclear], parts[2], scorer)
            lower[unclear], upper[unclear], labels[unclear] = parts

    def _own(self, x: Tensor, labels: Tensor, scorer: Scorer) -> Tensor:
        """The score [n] of each row for its own centroid."""
        return self._pick(scorer.padded, labels).mul_(x).sum(1).add_(scorer.offsets[labels])

    def _score_group(self, x: Tensor, labels: Tensor, scorer: Scorer, number: int) -> Tensor:
        """The best score [n] of a group's centroids other than the row's own."""
        scores = scorer.of_group(x, number)  # [n, group]
        self.num_scored += scores.numel()
        inside = labels - number * scorer.group
        member = ((inside >= 0) & (inside < scorer.group)).nonzero()[:, 0]
        scores[member, inside[member]] = -torch.inf
        return scores.amax(1)

    def _pick(self, x: Tensor, picked: Tensor) -> Tensor:
        """x[picked], valid until the next call: into the same memory each time, which is 5 times faster."""
        if len(self.picked) < len(picked):
            self.picked = x.new_empty(len(picked), x.shape[1])
        return torch.index_select(x, 0, picked, out=self.picked[: len(picked)])

    def _assign_all(
        self, lower: Tensor, upper: Tensor, x: Tensor, squares: Tensor, labels: Tensor, scorer: Scorer
    ) -> None:
        found: Nearest = scorer.nearest(x, squares)
        self.num_scored += len(x) * scorer.num_clusters
        labels.copy_(found.labels)
        upper.copy_(_upper(squares, found.best, scorer))
        lower.copy_(_lower(squares[:, None], found.rivals, scorer))


def _by_group(steps: Tensor, scorer: Scorer) -> Tensor:
    """The largest of each group's steps: [k] -> [groups]."""
    padded = steps.new_zeros(scorer.num_groups * scorer.group)
    padded[: len(steps)] = steps
    return padded.view(scorer.num_groups, -1).amax(1)


def _upper(squares: Tensor, scores: Tensor, scorer: Scorer) -> Tensor:
    """Of |x - c|, from |x|^2 and the score."""
    return (squares - 2 * scores + _error(squares, scorer)).clamp_min(0).sqrt() * (1 + torch.finfo(scores.dtype).eps)


def _lower(squares: Tensor, scores: Tensor, scorer: Scorer) -> Tensor:
    return (squares - 2 * scores - _error(squares, scorer)).clamp_min(0).sqrt() * (1 - torch.finfo(scores.dtype).eps)


def _error(squares: Tensor, scorer: Scorer) -> Tensor:
    """How far a squared distance can be off: by its score's error, which is half of `slack`, twice; and by |x|^2's."""
    unit = torch.finfo(squares.dtype).eps / 2
    return scorer.slack(squares) + (scorer.dim + 4) * unit * squares
