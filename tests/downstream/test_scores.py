"""Metrics against hand-computed cases, and against torchmetrics and scikit-learn on random input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torchmetrics.functional import classification

from distssl.downstream import classify, depth, keypoints, segment
from distssl.downstream.rows import Row
from distssl.downstream.task import Facts
from distssl.nn import backbones


def test_accuracy_and_macro_f1_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 5, 200), rng.integers(0, 7, 200)  # two classes that are never right
    found = classify.accuracies(predicted, labels)
    assert found["accuracy"] == sklearn_metrics.accuracy_score(labels, predicted)
    per_class = sklearn_metrics.f1_score(labels, predicted, labels=range(5), average=None)
    assert found["macro_f1"] == pytest.approx(per_class.mean())


def test_segmentation_by_hand() -> None:
    """Four pixels of class 0, two of 1; one of each is taken for the other, and a pixel without a class is left out."""
    true = torch.tensor([[0, 0, 0, 0, 1, 1, 255]])
    predicted = torch.tensor([[0, 0, 0, 1, 1, 0, 1]])
    counts = segment.confusion(predicted, true, 2)
    assert counts.tolist() == [[3, 1], [1, 1]]
    found = segment.of_confusion(counts.numpy())
    assert found["miou"] == pytest.approx((3 / 5 + 1 / 3) / 2)
    assert found["pixel_accuracy"] == pytest.approx(4 / 6)
    assert found["f1"] == pytest.approx((6 / 8 + 2 / 4) / 2)


def test_segmentation_agrees_with_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    true, predicted = torch.randint(0, 4, (2, 3, 20, 20), generator=generator)
    true[0, :5] = segment.IGNORED
    parts = [segment.confusion(p, t, 4).numpy() for p, t in zip(predicted, true, strict=True)]
    found = segment.Segment.score(parts)
    task = {"task": "multiclass", "num_classes": 4, "ignore_index": segment.IGNORED}
    assert found["miou"] == pytest.approx(float(classification.jaccard_index(predicted, true, average="macro", **task)))
    assert found["pixel_accuracy"] == pytest.approx(
        float(classification.accuracy(predicted, true, average="micro", **task))
    )
    assert found["f1"] == pytest.approx(float(classification.f1_score(predicted, true, average="macro", **task)))


def test_depth_by_hand() -> None:
    true, predicted = torch.tensor([1.0, 2.0, 4.0, 10.0]), torch.tensor([1.2, 2.0, 2.0, 12.6])
    halves = [depth.sums(predicted[half], true[half]) for half in (slice(0, 1), slice(1, 4))]
    found = depth.Depth.score(halves)
    assert found["abs_rel"] == pytest.approx((0.2 + 0 + 0.5 + 0.26) / 4)
    assert found["rmse"] == pytest.approx(((0.04 + 0 + 4 + 2.6**2) / 4) ** 0.5)
    assert found["delta_1"] == pytest.approx(2 / 4)  # 12.6 / 10 and 4 / 2 are not within 1.25


def test_keypoints_by_hand() -> None:
    """An image of extent 100, one point 4 off, one 8 off, one hidden; and one with a single visible point, 30 off."""
    first = [[4, 0, 0, 0, 1], [100, 8, 100, 0, 1], [0, 0, 500, 500, 0]]
    second = [[30, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    found = keypoints.of_points(np.array([first, second], float))
    assert found["pck_0.05"] == pytest.approx(1 / 2)
    assert found["pck_0.1"] == pytest.approx(2 / 2)
    assert found["mean_error"] == pytest.approx((4 + 8 + 30) / 3)


def test_a_heatmap_that_is_a_points_gaussian_gives_the_point_back() -> None:
    generator = torch.Generator().manual_seed(0)
    points = 3 + 10 * torch.rand(4, 5, 2, generator=generator)  # away from the edges
    heatmaps = keypoints.gaussians(points, 16, 16)
    assert torch.allclose(heatmaps.sum((2, 3)), torch.ones(4, 5))
    assert torch.allclose(keypoints.places(heatmaps.log()), points, atol=0.05)


def test_the_loss_of_points_is_that_of_their_exact_places_in_bf16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heatmaps in bf16, as autocast gives them: the loss is float64's of the same heatmaps and of unrounded points."""
    recipe = dataclasses.replace(keypoints.Keypoints.recipe, size_px=512)
    network = keypoints.Keypoints(backbones.build("resnet10", "3x3_s2", width=4), Facts(num_points=2), recipe)
    logits = (30 * torch.rand(1, 2, 128, 128, generator=torch.Generator().manual_seed(0))).bfloat16()
    monkeypatch.setattr(network, "_heatmaps", lambda views: logits)
    known = torch.tensor([[200.4, 301.7, 1], [511.2, 0.9, 1]])  # 200, 302, 512 (outside) and 0.9 in bf16
    whole = torch.tensor([[0.0, 0, 512, 1, 0]])  # the view is the image
    with torch.autocast("cpu", torch.bfloat16):
        found = network.loss({"frame": whole}, [known])

    target = keypoints.gaussians(known[None, :, :2].double() / 4, 128, 128)
    expected = -(target.flatten(2) * logits.double().flatten(2).log_softmax(-1)).sum(-1).mean()
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_average_precision_of_boxes_by_hand() -> None:
    """One class, two objects: found at once, and missed; a false box behind the right one changes nothing."""
    from distssl.downstream import detect

    image = {
        "boxes": np.array([[0, 0, 10, 10], [50, 50, 60, 60]], np.float32),
        "scores": np.array([0.9, 0.8], np.float32),
        "labels": np.array([0, 0]),
        "true_boxes": np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float32),
        "true_labels": np.array([0, 0]),
    }
    found = detect.average_precision([image])
    # COCO reads precision at 101 recalls 0, 0.01, ... 1: those up to 1/2 have 1, the rest 0.
    assert found["ap"] == pytest.approx(51 / 101)
    assert found["ap50"] == pytest.approx(51 / 101)


def test_a_rows_interval_is_students() -> None:
    values = (0.5, 0.6, 0.7)
    row = Row("random", "knn", None, "accuracy", values)
    assert row.value == pytest.approx(0.6)
    assert row.interval == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)  # t of 2 degrees of freedom at 97.5 %
    assert Row("random", "knn", None, "accuracy", (0.5,)).interval is None
