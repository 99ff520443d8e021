"""Classifying with frozen features: nearest neighbours and a linear probe."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import collectives
from distssl.context import Context
from distssl.downstream.features import Features

KNN_TEMPERATURE = 0.1
QUERY_BLOCK = 1024


def knn(train: Features, test: Features, *, neighbours: int, context: Context) -> dict[str, float]:
    """Accuracy of a vote of the nearest training features, each weighted by exp(cosine / 0.1). Every rank calls it.

    Wu, Xiong, Yu, Lin: Unsupervised Feature Learning via Non-Parametric Instance Discrimination. CVPR 2018,
    https://arxiv.org/abs/1805.01978. Features are centred on the training mean first: those of a random network
    share a large common part that says nothing of the image. Exact: every rank takes its blocks of the test and reads
    the training features block by block.
    """
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    mean, labels = train.mean(), torch.from_numpy(train.labels)
    correct = torch.zeros(1, dtype=torch.float64)
    for first, queries in blocks_of_rank(test, context):
        similarity, nearest = nearest_of(F.normalize(queries - mean, dim=1), train, mean, neighbours)  # [q, k] both
        votes = torch.zeros(len(queries), num_classes)
        votes.scatter_add_(1, labels[nearest], ((similarity - 1) / KNN_TEMPERATURE).exp())
        truth = torch.from_numpy(test.labels[first : first + len(queries)])
        correct += (votes.argmax(1) == truth).sum()
    return {"accuracy": float(collectives.sum_(correct)) / len(test)}


def blocks_of_rank(test: Features, context: Context) -> Iterator[tuple[int, Tensor]]:
    """This rank's blocks of queries; the same blocks at every number of ranks, so products are rounded alike."""
    starts = range(0, len(test), QUERY_BLOCK)
    for first in starts[context.rank :: context.world_size]:
        yield first, test.block(first, first + QUERY_BLOCK)


def nearest_of(queries: Tensor, keys: Features, mean: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k (or all) nearest keys by cosine, nearest first: cosines [q, k] and rows int64 [q, k].

    queries: unit rows [q, D]; keys are centred on `mean`.
    """
    similarity, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for first, block in keys.blocks():
        here = queries @ F.normalize(block - mean, dim=1).T  # [q, n]
        similarity = torch.cat([similarity, here], dim=1)
        rows = torch.cat([rows, torch.arange(first, first + len(block)).expand(len(queries), -1)], dim=1)
        similarity, kept = similarity.topk(min(k, similarity.shape[1]), dim=1)
        rows = rows.gather(1, kept)
    return similarity, rows


def linear(train: Features, test: Features, *, inverse_l2: float, context: Context) -> dict[str, float]:
    """Accuracy and macro F1 of multinomial logistic regression on standardised features, fitted by rank 0."""

    def fit() -> dict[str, float]:
        return _linear(train, test, inverse_l2) if context.rank == 0 else {}

    return collectives.broadcast_object(collectives.patiently(fit))


def _linear(train: Features, test: Features, inverse_l2: float) -> dict[str, float]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(train.labels)) < 2:
        return accuracies(np.broadcast_to(train.labels[0], test.labels.shape), test.labels)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_l2, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 steps is the recipe, converged or not
        probe.fit(train.all(), train.labels)
    return accuracies(np.concatenate([probe.predict(block.numpy()) for _, block in test.blocks()]), test.labels)


def accuracies(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Of int64 [N] both: the share that is right, and the mean of the classes' F1 (0 for one never predicted)."""
    from sklearn import metrics

    f1 = metrics.f1_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)  # pyright: ignore[reportArgumentType]
    return {"accuracy": float((predicted == labels).mean()), "macro_f1": float(f1)}
