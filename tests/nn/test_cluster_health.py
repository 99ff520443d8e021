from __future__ import annotations

import logging

import numpy as np
import pytest

from distssl.nn import cluster_health


def test_figures_of_a_clustering_are_what_counting_gives() -> None:
    clusters = np.array([0] * 5 + [1] * 3 + [3] * 2 + [-1])
    labels = np.array([0] * 5 + [1] * 5 + [-1])
    found = cluster_health.figures(clusters, None, labels, k=4)
    assert (found["smallest"], found["median"], found["largest"], found["empty"]) == (0, 2.5, 5, 1)
    p = np.array([0.5, 0.3, 0.2])
    assert found["entropy"] == pytest.approx(-(p * np.log(p)).sum() / np.log(4))
    assert found["trivial"] == 0
    # I = H(labels), for clusters tell the label: I / ((H(clusters) + H(labels)) / 2)
    assert found["nmi_labels"] == pytest.approx(2 * np.log(2) / (-(p * np.log(p)).sum() + np.log(2)))
    assert "nmi_previous" not in found


def test_the_same_clusters_by_other_names_are_no_change() -> None:
    before = np.array([0, 0, 0, 1, 1, 2, 2, 2, -1])
    now = np.array([2, 2, 2, 0, 0, 1, 1, 1, 0])
    found = cluster_health.figures(now, before, np.full(9, -1), k=3)
    assert found["reassigned"] == 0
    assert found["nmi_previous"] == pytest.approx(1)
    assert "nmi_labels" not in found
    now[0] = 0
    now[7] = 0
    assert cluster_health.figures(now, before, np.full(9, -1), k=3)["reassigned"] == 2


def test_samples_that_leave_most_of_their_old_cluster_are_counted() -> None:
    rng = np.random.default_rng(0)
    before, now = rng.integers(0, 20, 1000), rng.integers(0, 30, 1000)
    expected = sum((before == b).sum() - np.bincount(now[before == b]).max() for b in range(20))
    assert cluster_health.num_reassigned(now, before) == expected


def test_one_cluster_for_nearly_all_is_warned_of_by_name(caplog: pytest.LogCaptureFixture) -> None:
    clusters = np.array([2] * 95 + [0, 1, 1, 3, 3])
    with caplog.at_level(logging.WARNING):
        found = cluster_health.figures(clusters, None, np.full(100, -1), k=4)
    assert found["trivial"] == 1
    assert "trivial solution: one of 4 clusters holds 95.0 % of the samples" in caplog.text
