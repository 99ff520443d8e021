"""Draws: uniform, unrelated, and a function of (seed, epoch, id, column) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from distssl.data import draws, graph
from distssl.data.sample import Sample


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 1), (1, 0), (2**63 - 1, 99)])
def test_every_column_is_uniform_in_the_unit_interval(seed: int, epoch: int) -> None:
    u = draws.uniforms(seed, epoch, np.arange(20_000), 8)
    assert u.dtype == np.float32
    assert u.min() >= 0
    assert u.max() < 1
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3


def test_a_row_depends_on_its_own_id_alone() -> None:
    ids = np.array([5, 10**9, 0, 5, 17, 2**62])
    whole = draws.uniforms(3, 4, ids, 16)
    assert np.array_equal(whole[0], whole[3])
    for row, sample in zip(whole, ids, strict=True):
        assert np.array_equal(draws.uniforms(3, 4, np.array([sample]), 16)[0], row)
    assert np.array_equal(draws.uniforms(3, 4, ids[::-1], 16), whole[::-1])
    assert np.array_equal(draws.uniforms(3, 4, ids, 5), whole[:, :5])  # more draws leave the first ones alone


def test_nothing_is_correlated_with_its_neighbours() -> None:
    n, limit = 50_000, 5 / np.sqrt(50_000)  # five standard deviations of a correlation of independent draws
    u = draws.uniforms(0, 0, np.arange(n), 8)
    between_columns = np.corrcoef(u.T) - np.eye(8)
    assert np.abs(between_columns).max() < limit
    others = {
        "the next id": np.roll(u, 1, axis=0),
        "the next epoch": draws.uniforms(0, 1, np.arange(n), 8),
        "the next seed": draws.uniforms(1, 0, np.arange(n), 8),
        "seed and epoch swapped": draws.uniforms(1, 0, np.arange(n), 8) - draws.uniforms(0, 1, np.arange(n), 8),
        "a distant id": draws.uniforms(0, 0, np.arange(n) + 2**40, 8),
    }
    for name, other in others.items():
        for i in range(8):
            for j in range(8):
                assert abs(np.corrcoef(u[:, i], other[:, j])[0, 1]) < limit, name


def test_all_rows_of_many_seeds_and_epochs_differ() -> None:
    rows = [draws.uniforms(seed, epoch, np.arange(50), 3) for seed in range(20) for epoch in range(20)]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 20 * 20 * 50


def run(views: graph.Views, ids: np.ndarray, batch_size: int = 64) -> dict[str, torch.Tensor]:
    """The views of ids in seed 3, epoch 2, with bytes that nobody looks at."""
    feeds = iter([graph.Feed(2, ids, np.full(len(ids), -1), [b"x"] * len(ids))])
    built = graph.Graph(
        views, lambda: next(feeds), seed=3, batch_size=batch_size, threads=1, prefetch=1, device=torch.device("cpu")
    )
    return built.run()


def take(sample: Sample) -> dict[str, object]:
    d = sample.draws
    taken = {"unit": d.unit(), "uniform": d.uniform(-3, 5), "coin": d.coin(0.3), "integer": d.integer(7)}
    return taken | {"log_uniform": d.log_uniform(0.01, 10)}


def test_draws_in_a_graph_are_closed_forms_of_the_columns() -> None:
    ids = np.arange(64) * 1001
    u = draws.uniforms(3, 2, ids, 5)
    got = {name: tensor.numpy() for name, tensor in run(take, ids).items()}
    assert np.array_equal(got["id"], ids)
    assert np.array_equal(got["unit"], u[:, 0])
    assert got["uniform"] == pytest.approx(-3 + 8 * u[:, 1], abs=1e-6)
    assert np.array_equal(got["coin"].astype(bool), u[:, 2] < np.float32(0.3))
    assert got["integer"].dtype == np.int32
    assert np.array_equal(got["integer"], np.floor(7 * u[:, 3]))
    assert got["log_uniform"] == pytest.approx(0.01 * 1000 ** u[:, 4], rel=1e-5)


def branch(sample: Sample) -> dict[str, object]:
    x = sample.draws.unit()
    if sample.draws.coin(0.5):
        x = sample.draws.unit()
    return {"inside": x, "after": sample.draws.unit()}


def test_a_branch_that_is_not_taken_uses_up_its_columns() -> None:
    ids = np.arange(64)
    u = draws.uniforms(3, 2, ids, 4)
    got = run(branch, ids)
    assert np.array_equal(got["inside"].numpy(), np.where(u[:, 1] < 0.5, u[:, 2], u[:, 0]))
    assert np.array_equal(got["after"].numpy(), u[:, 3])
