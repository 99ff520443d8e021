"""Clustering with frozen features: do k-means' clusters of the test images agree with their classes?"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from distssl import collectives
from distssl.context import Context
from distssl.downstream.features import BLOCK, Features
from distssl.nn import clustering_metrics, kmeans, rows

ITERATIONS = 100


def cluster(test: Features, context: Context, seed: int) -> np.ndarray:
    """The cluster of each test image, int64 [N]: spherical k-means of the centred features, as many as classes.

    Fewer where a collapsed backbone gives fewer different features.
    """
    first, last = (len(test) * rank // context.world_size for rank in (context.rank, context.rank + 1))
    mean = test.mean()
    x = [F.normalize(test.block(at, min(at + BLOCK, last)) - mean, dim=1) for at in range(first, last, BLOCK)]
    mine = torch.cat(x) if x else torch.empty(0, len(mean))
    num_clusters = rows.num_distinct(rows.Rows(mine), at_most=len(np.unique(test.labels)))
    found = kmeans.fit(mine, num_clusters, ITERATIONS, seed, ids=test.ids[first:last], spherical=True)
    return np.concatenate(collectives.gather_objects(found.labels.numpy()))


def agreement(clusters: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """ari, nmi and accuracy under the best matching of clusters with classes."""
    return {
        "ari": clustering_metrics.adjusted_rand(clusters, labels),
        "nmi": clustering_metrics.normalised_mutual_information(clusters, labels),
        "accuracy": clustering_metrics.hungarian_accuracy(clusters, labels),
    }
