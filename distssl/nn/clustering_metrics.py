"""How well two labellings of the same rows agree, whatever the clusters are called: (labels, labels) -> float.

Labels are int [N], tensors or arrays. Raises ValueError where there are none, or not as many of each.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def adjusted_rand(a: Any, b: Any) -> float:
    """1 for the same clusters, 0 on average for independent ones, at least -0.5.

    Hubert and Arabie, Comparing Partitions, Journal of Classification 2, 1985, https://doi.org/10.1007/BF01908075.
    """
    from sklearn import metrics

    return float(metrics.adjusted_rand_score(*_pair(a, b)))


def normalised_mutual_information(a: Any, b: Any) -> float:
    """The labellings' mutual information over the mean of their entropies, in [0, 1].

    DeepCluster's health metric and its paper's section 4.1 (https://arxiv.org/abs/1807.05520), which divides by the
    geometric mean; the arithmetic one is scikit-learn's default. Not adjusted for chance: it grows with the number of
    clusters.
    """
    from sklearn import metrics

    return float(metrics.normalized_mutual_info_score(*_pair(a, b)))


def hungarian_accuracy(a: Any, b: Any) -> float:
    """The share of rows that agree under the best one-to-one matching of clusters with classes, in (0, 1].

    Kuhn, The Hungarian Method for the Assignment Problem, 1955, https://doi.org/10.1002/nav.3800020109.
    """
    from scipy import optimize
    from sklearn.metrics import cluster

    counts = cluster.contingency_matrix(*_pair(a, b))
    matched = optimize.linear_sum_assignment(counts, maximize=True)
    return float(counts[matched].sum() / counts.sum())


def _pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    left, right = (
        labels.cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels) for labels in (a, b)
    )
    if left.shape != right.shape or left.ndim != 1 or not len(left):
        raise ValueError(f"labels of shapes {list(left.shape)} and {list(right.shape)}; [N] twice, N > 0, is right")
    return left, right
