"""kNN and retrieval, exact by blocks and over ranks, against torchmetrics and a plain computation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

from distssl.context import Context
from distssl.downstream import classify, cluster, features, retrieve
from distssl.downstream.features import Features

NUM_CLASSES = 6


def features_of(num: int, seed: int, classes: int = NUM_CLASSES, dim: int = 8) -> Features:
    """Noisy points around a centre a class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, num)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    x = (centres[labels] + 1.5 * rng.normal(size=(num, dim))).astype(np.float32)
    return Features(np.arange(num), labels, x, np.arange(num))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that do not divide the numbers of rows."""
    monkeypatch.setattr(features, "BLOCK", 37)
    monkeypatch.setattr(features.Features.blocks, "__defaults__", (37,))
    monkeypatch.setattr(classify, "QUERY_BLOCK", 23)


def similarities(train: Features, test: Features) -> torch.Tensor:
    mean = torch.from_numpy(train.x).mean(0)
    keys, queries = (F.normalize(torch.from_numpy(found.x) - mean, dim=1) for found in (train, test))
    return queries @ keys.T


@pytest.mark.usefixtures("small_blocks")
def test_nearest_neighbours_by_blocks_are_those_of_the_whole(tmp_path: Path) -> None:
    train, test = features_of(200, 1), features_of(90, 2)
    values, nearest = similarities(train, test).topk(5, dim=1)
    votes = torch.zeros(len(test), NUM_CLASSES)
    votes.scatter_add_(1, torch.from_numpy(train.labels)[nearest], (values / classify.KNN_TEMPERATURE).exp())
    expected = float((votes.argmax(1).numpy() == test.labels).mean())
    assert 0.3 < expected < 0.95
    assert classify.knn(train, test, neighbours=5, context=Context(tmp_path)) == {"accuracy": pytest.approx(expected)}


@pytest.mark.usefixtures("small_blocks")
def test_retrieval_agrees_with_torchmetrics(tmp_path: Path) -> None:
    gallery, queries = features_of(200, 1), features_of(90, 2)
    relevant = torch.from_numpy(queries.labels[:, None] == gallery.labels[None])
    index = torch.arange(len(queries))[:, None].expand_as(relevant)
    found = retrieve.retrieve(gallery, queries, Context(tmp_path))
    scores = similarities(gallery, queries) + 2  # torchmetrics takes what has a score of 0 or less for irrelevant
    flat = scores.flatten(), relevant.flatten(), index.flatten()
    assert found["map"] == pytest.approx(float(RetrievalMAP()(flat[0], flat[1], indexes=flat[2])), abs=1e-6)
    for k in retrieve.CUTOFFS:
        expected = float(RetrievalHitRate(top_k=k)(flat[0], flat[1], indexes=flat[2]))
        assert found[f"recall_at_{k}"] == pytest.approx(expected)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [each.numel() for each in (made if isinstance(made, tuple | list) else [made]) if torch.is_tensor(each)]
        self.numbers = max(self.numbers, *sizes) if sizes else self.numbers
        return made


@pytest.mark.usefixtures("small_blocks")
def test_retrieval_keeps_few_similarities_of_a_large_sorted_gallery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sorted classes of 600: 23 queries a block would keep 23 times their class, or the gallery."""
    gallery, queries = features_of(1800, 1, classes=3), features_of(60, 2, classes=3)
    gallery = dataclasses.replace(gallery, labels=np.sort(gallery.labels), at=np.argsort(gallery.labels, kind="stable"))
    whole = retrieve.retrieve(gallery, queries, Context(tmp_path))
    largest = int(np.bincount(gallery.labels).max())
    monkeypatch.setattr(retrieve, "MOST_KEPT", 4 * largest)
    with Largest() as seen:
        found = retrieve.retrieve(gallery, queries, Context(tmp_path))
    assert found == pytest.approx(whole, abs=1e-9)
    assert seen.numbers <= 4 * (largest + 1)
    relevant = torch.from_numpy(queries.labels[:, None] == gallery.labels[None])
    index = torch.arange(len(queries))[:, None].expand_as(relevant).flatten()
    scores = similarities(gallery, queries)[:, torch.from_numpy(gallery.at)] + 2
    expected = RetrievalMAP()(scores.flatten(), relevant.flatten(), indexes=index)
    assert found["map"] == pytest.approx(float(expected), abs=1e-6)


def test_average_precision_by_hand() -> None:
    """A query whose images of its class are first and third, level with another: (1/1 + 2/4) / 2."""
    x = np.array([[1, 0], [0.9, 0.1], [0.7, 0.3], [0.7, 0.3], [0, 1]], np.float32)
    gallery = Features(np.arange(5), np.array([0, 1, 0, 1, 1]), x, np.arange(5))
    query, nowhere = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    found = retrieve.average_precision(torch.cat([query, nowhere]), torch.tensor([0, 7]), gallery, torch.zeros(2))
    assert found.tolist() == pytest.approx([(1 / 1 + 2 / 4) / 2, 0])


def test_queries_without_their_class_in_the_gallery_are_left_out(tmp_path: Path, caplog) -> None:
    gallery = features_of(100, 1, classes=3)
    queries = features_of(40, 2)
    there = queries.only(queries.ids[queries.labels < 3])
    context = Context(tmp_path)
    assert retrieve.retrieve(gallery, queries, context) == pytest.approx(retrieve.retrieve(gallery, there, context))
    assert f"{len(queries) - len(there)} of {len(queries)} queries" in caplog.text


def test_a_collapsed_backbone_is_evaluated_too(tmp_path: Path) -> None:
    """All features equal, or two of them: no better than chance, and no error."""
    labels = np.arange(48) % 4
    for different in (1, 2):
        x = np.repeat(np.eye(8, dtype=np.float32)[:different], 48 // different, axis=0)
        collapsed = Features(np.arange(48), labels, x, np.arange(48))
        context = Context(tmp_path)
        assert classify.knn(collapsed, collapsed, neighbours=5, context=context)["accuracy"] <= 0.3
        clusters = cluster.cluster(collapsed, context, seed=0)
        assert len(np.unique(clusters)) == different
        assert cluster.agreement(clusters, labels)["nmi"] < 0.01
        assert retrieve.retrieve(collapsed, collapsed, context)["map"] < 0.3


def search(folder: Path) -> tuple[dict[str, float], dict[str, float], np.ndarray]:
    train, test = features_of(3000, 1), features_of(2100, 2)
    with Context(folder) as context:
        clusters = cluster.cluster(test, context, seed=0)
        found = retrieve.retrieve(train, test, context)
        return classify.knn(train, test, neighbours=5, context=context), found, clusters


def test_search_and_clusters_are_the_same_at_any_world_size(ranks, tmp_path: Path) -> None:
    knn, found, clusters = search(tmp_path)
    assert cluster.agreement(clusters, features_of(2100, 2).labels)["nmi"] > 0.1
    for of_rank in ranks(2).run(search, tmp_path):
        assert (of_rank[0], of_rank[1]) == (knn, found)
        assert np.array_equal(of_rank[2], clusters)
