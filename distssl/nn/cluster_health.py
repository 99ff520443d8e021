"""What a clustering of a dataset says of a training: figures, and trivial solutions by their names.

Clusters are int64 [num_samples], -1 for a sample that has none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from distssl import collectives
from distssl.nn import clustering_metrics

log = logging.getLogger(__name__)

TRIVIAL_SHARE = 0.9  # of all samples in one cluster
TELL_EVERY_S = 30.0


def figures(clusters: np.ndarray, before: np.ndarray | None, labels: np.ndarray, k: int) -> dict[str, float]:
    """Figures of one clustering into k clusters; the same on every rank.

    before: the clustering of the epoch before, None where there is none. labels: int [num_samples], -1 for none.
    A trivial solution is a warning here and `trivial` = 1: a training may come back from it, and whoever watches it
    should know before it has taken days.
    """
    here = clusters >= 0
    sizes = np.bincount(clusters[here], minlength=k)
    shares = sizes[sizes > 0] / here.sum()
    found = {
        "smallest": float(sizes.min()),
        "median": float(np.median(sizes)),
        "largest": float(sizes.max()),
        "empty": float((sizes == 0).sum()),
        "entropy": float(-(shares * np.log(shares)).sum() / np.log(k)) if k > 1 else 1.0,
        "trivial": float(k > 1 and shares.max() >= TRIVIAL_SHARE),
    }
    if found["trivial"] and collectives.rank() == 0:
        log.warning("trivial solution: one of %d clusters holds %.1f %% of the samples", k, 100 * shares.max())
    labelled = here & (labels >= 0)
    if labelled.any():
        found["nmi_labels"] = clustering_metrics.normalised_mutual_information(clusters[labelled], labels[labelled])
    if before is not None and (both := here & (before >= 0)).any():
        found["nmi_previous"] = clustering_metrics.normalised_mutual_information(clusters[both], before[both])
        found["reassigned"] = float(num_reassigned(clusters[both], before[both]))
    return found


def teller(what: str) -> Callable[..., None]:
    """A callback (done, in all, ...) that says in the log how far a long piece of work is, now and then, on rank 0."""
    said = time.monotonic()

    def tell(done: int, num: int, *_: float) -> None:
        nonlocal said
        if collectives.rank() == 0 and time.monotonic() - said > TELL_EVERY_S:
            said = time.monotonic()
            log.info("%s: %d of %d", what, done, num)

    return tell


def num_reassigned(clusters: np.ndarray, before: np.ndarray) -> int:
    """How many samples did not go where most of their old cluster went: numbers of clusters mean nothing over epochs.

    Both int64 [N], from 0.
    """
    pairs, counts = np.unique(before * (int(clusters.max()) + 1) + clusters, return_counts=True)
    most = np.zeros(int(before.max()) + 1, np.int64)
    np.maximum.at(most, pairs // (int(clusters.max()) + 1), counts)
    return len(clusters) - int(most.sum())
