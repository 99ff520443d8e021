"""Evaluations by ranks that share no run folder: the figures are those of ranks that do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distssl import method
from distssl.config import Run
from distssl.context import Context
from distssl.data.shards import Dataset
from distssl.downstream import features
from distssl.downstream.evaluate import Evaluation
from tests import runs
from tests.conftest import Ranks


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"))


def host(folder: Path, num: int) -> Path:
    """This rank's run folder where there are so many of them, with as many ranks each."""
    return folder / f"host{torch.distributed.get_rank() * num // torch.distributed.get_world_size()}"


def extracted(run: Run, folder: Path, num_hosts: int) -> np.ndarray:
    """float32 [N, D] as this rank reads them; each has some rows, in several blocks."""
    features.BATCH_SIZE, features.BLOCK = 8, 20  # of this process, which is the pool's
    try:
        dataset, backbone = Dataset.open(Path(run.data.source)), method.build(run).evaluated()
        with Context(host(folder, num_hosts)) as context:
            how, kept = features.Extraction.of_run(run, context.device), context.run_dir / "features"
            found = features.extract(backbone, dataset, dataset.ids_with("label"), how, context, kept)
            return np.array(found.all())
    finally:
        features.BATCH_SIZE, features.BLOCK = 256, 8192


def test_every_host_has_all_features(ranks: Callable[[int], Ranks], packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path)
    together = ranks(4).run(extracted, run, tmp_path / "one", 1)
    apart = ranks(4).run(extracted, run, tmp_path / "two", 2)
    assert len(together[0]) == Dataset.open(packed).num_labelled
    assert np.abs(together[0]).max(1).min() > 0  # no row was left out
    for found in (*together, *apart):
        assert np.array_equal(found, together[0])
    files = sorted(tmp_path.glob("*/host*/features/*/x.npy"))
    assert len(files) == 3
    assert len({path.read_bytes() for path in files}) == 1
    shutil.rmtree(tmp_path / "two" / "host1")  # a host that came later
    for found in ranks(4).run(extracted, run, tmp_path / "two", 2):
        assert np.array_equal(found, together[0])


def figures(run: Run, folder: Path, num_hosts: int) -> dict[str, dict[str, float]]:
    with Context(host(folder, num_hosts)) as context:
        judge = Evaluation(run, context, Dataset.open(Path(run.data.source)), None)
        return {task: judge.figure(task, "random", None, 0) for task in ("knn", "linear", "cluster", "finetune")}


def test_tasks_have_the_same_figures_on_one_host_and_on_two(
    ranks: Callable[[int], Ranks], packed: Path, tmp_path: Path
) -> None:
    run = runs.tiny(packed, tmp_path, "eval.fit.steps=3", "eval.fit.batch=8", "train.precision=float64")
    together = ranks(2).run(figures, run, tmp_path / "one", 1)
    apart = ranks(2).run(figures, run, tmp_path / "two", 2)
    assert together[0].keys() == {"knn", "linear", "cluster", "finetune"}
    for found in (*together, *apart):
        assert found == together[0]
    shutil.rmtree(tmp_path / "two" / "host0" / "features")
    shutil.rmtree(tmp_path / "two" / "host1" / "fits")  # what rank 0 has counts, and it is finished
    assert ranks(2).run(figures, run, tmp_path / "two", 2) == apart
