from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn import metrics

from distssl.nn import clustering_metrics

A = torch.tensor([0, 0, 0, 1, 1, 1])
B = np.array([5, 5, 7, 7, 9, 9])
ALL = [
    clustering_metrics.adjusted_rand,
    clustering_metrics.normalised_mutual_information,
    clustering_metrics.hungarian_accuracy,
]


@pytest.mark.parametrize("metric", ALL)
def test_renamed_clusters_agree_fully(metric) -> None:
    assert metric(A, 3 - 2 * A) == pytest.approx(1)
    assert type(metric(A, B)) is float


def test_a_case_by_hand() -> None:
    # Pairs together in A: 6, in B: 3, in both: 2 of 15; expected by chance 6 * 3 / 15.
    assert clustering_metrics.adjusted_rand(A, B) == pytest.approx((2 - 1.2) / (4.5 - 1.2))
    # B tells A but for its middle cluster: I = log 2 - (1/3) log 2.
    information = 2 / 3 * np.log(2)
    assert clustering_metrics.normalised_mutual_information(A, B) == pytest.approx(
        2 * information / (np.log(2) + np.log(3))
    )
    assert clustering_metrics.hungarian_accuracy(A, B) == pytest.approx(4 / 6)


def test_hungarian_accuracy_is_the_best_of_all_matchings() -> None:
    generator = np.random.default_rng(0)
    for _ in range(10):
        a, b = generator.integers(0, 4, 60), generator.integers(0, 5, 60)
        best = max(np.mean(np.array(names)[a] == b) for names in itertools.permutations(range(5), 4))
        assert clustering_metrics.hungarian_accuracy(a, b) == pytest.approx(best)
        assert clustering_metrics.adjusted_rand(a, b) == metrics.adjusted_rand_score(a, b)
        assert clustering_metrics.normalised_mutual_information(a, b) == metrics.normalized_mutual_info_score(a, b)


@pytest.mark.parametrize("metric", ALL)
def test_labels_of_other_rows_are_refused(metric) -> None:
    with pytest.raises(ValueError, match=r"\[N\] twice"):
        metric(A, B[:3])
    with pytest.raises(ValueError, match="N > 0"):
        metric([], [])
