"""Which samples an epoch draws where it is to see as many of each cluster: a pure function of (seed, epoch, clusters).

Of N samples in K clusters that hold any, each cluster gives N // K + 1, samples again only where it has fewer; what is
too much is taken back by lot. Caron et al., Deep Clustering for Unsupervised Learning of Visual Features, ECCV 2018,
section 3.3: a batch uniform over pseudo-labels keeps large clusters from ruling the gradient.

A cluster that has fewer gives all its samples equally often, but for one more of some. The published code draws them
with replacement: as often on average, but a cluster of N / K samples then shows 63 % of them in an epoch.
"""

from __future__ import annotations

import numpy as np

from distssl.data import draws

_MEMBER, _KEPT = 0xB1, 0xB2  # keep two draws of one key apart


def choose(clusters: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """clusters: int64 [N], -1 for a sample to leave out -> the ids an epoch draws, int64 [N], ascending.

    Raises ValueError where no sample has a cluster.
    """
    members = np.flatnonzero(clusters >= 0)
    if not len(members):
        raise ValueError("no sample has a cluster; at least one is right")
    of_member = clusters[members]
    order = np.lexsort((draws.hash64(seed, epoch, members, _MEMBER), of_member))
    members, of_member = members[order], of_member[order]  # cluster after cluster, shuffled within
    names, first, sizes = np.unique(of_member, return_index=True, return_counts=True)
    each = len(clusters) // len(names) + 1
    place = np.arange(len(members)) - np.repeat(first, sizes)
    times = np.repeat(each // sizes, sizes) + (place < np.repeat(each % sizes, sizes))
    chosen = np.repeat(members, times)
    kept = np.argsort(draws.hash64(seed, epoch, np.arange(len(chosen)), _KEPT), kind="stable")[: len(clusters)]
    return np.sort(chosen[kept])


def copies(ids: np.ndarray) -> np.ndarray:
    """For ids int64 [N], ascending: how many times each has come before, int64 [N]."""
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    return np.arange(len(ids)) - np.repeat(first, counts)
