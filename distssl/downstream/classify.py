"""Classifying with frozen features: nearest neighbours and a linear probe."""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F

from distssl.downstream.features import Features

KNN_TEMPERATURE = 0.1
QUERY_BLOCK = 1024


def knn(train: Features, test: Features, *, neighbours: int) -> float:
    """Accuracy of a vote of the nearest training features, each weighted by exp(cosine / 0.1).

    Wu, Xiong, Yu, Lin: Unsupervised Feature Learning via Non-Parametric Instance Discrimination. CVPR 2018,
    https://arxiv.org/abs/1805.01978. Features are centred on the training mean first: those of a random network
    share a large common part that says nothing of the image.
    """
    mean = torch.from_numpy(train.x).mean(0)
    keys = F.normalize(torch.from_numpy(train.x) - mean, dim=1)  # [N, D]
    queries = F.normalize(torch.from_numpy(test.x) - mean, dim=1)  # [M, D]
    labels = torch.from_numpy(train.labels)
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    correct = 0
    for block, truth in zip(queries.split(QUERY_BLOCK), torch.from_numpy(test.labels).split(QUERY_BLOCK), strict=True):
        similarity, nearest = (block @ keys.T).topk(min(neighbours, len(keys)), dim=1)  # [m, k]
        votes = torch.zeros(len(block), num_classes)
        votes.scatter_add_(1, labels[nearest], ((similarity - 1) / KNN_TEMPERATURE).exp())
        correct += int((votes.argmax(1) == truth).sum())
    return correct / len(test.labels)


def linear(train: Features, test: Features, *, inverse_l2: float) -> float:
    """Accuracy of multinomial logistic regression on standardised features."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(train.labels)) < 2:
        return float((test.labels == train.labels[0]).mean())
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_l2, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 steps is the recipe, converged or not
        probe.fit(train.x, train.labels)
    return float(probe.score(test.x, test.labels))
