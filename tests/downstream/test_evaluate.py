"""Rows of an evaluation: every task, the same at two workers, made once, and read back."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distssl import job, method, run_folder, weights
from distssl.config import Run
from distssl.context import Context
from distssl.data import shards, store
from distssl.data.shards import Dataset
from distssl.downstream import classify, features, needs, pictures
from distssl.downstream.evaluate import Evaluation
from distssl.downstream.rows import Row, read_summary
from distssl.errors import RunError
from tests import planted, runs

FIT = ["eval.fit.steps=3", "eval.fit.batch=8", "eval.num_seeds=2", 'eval.labels=["3/class", null]']
CLASSIFYING = ("knn", "linear", "retrieval", "cluster", "finetune")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"))


def evaluated(run: Run) -> list[Row]:
    with Context(run.run_dir) as context:
        job.evaluate_run(run, context, None)
    return read_summary(run.run_dir)


def test_every_task_that_the_labels_allow_gives_rows_of_three_backbones(ranks, packed: Path, tmp_path: Path) -> None:
    run = runs.trained(runs.tiny(packed, tmp_path, *FIT, "train.epochs=1", "train.precision=float64"))
    rows = evaluated(run)
    assert {row.task for row in rows} == set(CLASSIFYING)
    numbers = {row.labels for row in rows if row.task == "finetune"}
    assert numbers == {12, None}
    for row in rows:
        assert all(0 <= value <= 1 for value in row.values) or row.metric == "ari"
        deterministic = row.task == "retrieval" or (row.task in ("knn", "linear") and row.labels is None)
        assert len(row.values) == (1 if deterministic else 2)
    for backbone in ("random", "pretrained", "supervised"):
        metrics = {(row.task, row.metric) for row in rows if row.backbone == backbone}
        assert {("finetune", "macro_f1"), ("retrieval", "map"), ("cluster", "ari"), ("knn", "accuracy")} <= metrics
    listed = json.loads((run.run_dir / "summary.json").read_text())["rows"]
    assert {row["value"] for row in listed} == {row.value for row in rows}
    for name in ("neighbours", "clusters"):
        image = Image.open(run.run_dir / pictures.FOLDER / f"{name}_packed_pretrained.png")
        assert np.asarray(image).std() > 10
    kept = np.load(run.run_dir / pictures.FOLDER / pictures.PROJECTOR)
    assert len(kept["x"]) == len(kept["labels"]) == len(kept["thumbnails"])

    pretrained = [row for row in rows if row.backbone == "pretrained"]
    for of_rank in ranks(2).run(evaluated_elsewhere, run, tmp_path / "two", timeout_s=150):
        assert [row.place for row in of_rank] == [row.place for row in pretrained]
        for ours, theirs in zip(pretrained, of_rank, strict=True):
            assert theirs.values == pytest.approx(ours.values, abs=0.05)  # a rounding may decide an image or two


def evaluated_elsewhere(run: Run, storage: Path) -> list[Row]:
    """Of the same checkpoint, with a run folder of its own: nothing that another evaluation has kept is used."""
    with Context(run.run_dir) as context:
        judge = Evaluation(
            run, context, Dataset.open(Path(run.data.source)), None, run_folder.trained(run, run.run_dir)
        )
        storage.mkdir(exist_ok=True)
        context.run_dir = storage
        return [row for rows in judge.rows(CLASSIFYING, ["pretrained"]) for row in rows]


def test_features_are_made_once_for_a_checkpoint_and_a_dataset(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.tiny(packed, tmp_path)
    dataset, backbone = Dataset.open(packed), method.build(run).evaluated()
    ids, how = dataset.ids_with("label"), features.Extraction.of_run(run, torch.device("cpu"))
    with Context(tmp_path) as context:
        first = features.extract(backbone, dataset, ids, how, context, tmp_path / "cache")
        in_memory = features.extract(backbone, dataset, ids, how, context)
        assert np.array_equal(first.all(), in_memory.all())
        assert np.array_equal(first.labels, dataset.rows(ids).label)

        monkeypatch.setattr(features, "share", None)  # nothing is embedded again
        again = features.extract(backbone, dataset, ids, how, context, tmp_path / "cache")
        assert np.array_equal(again.all(), first.all())
        with torch.no_grad():
            next(backbone.parameters()).mul_(1.01)
        for changed in ((backbone, ids), (method.build(run).evaluated(), ids[:-1])):
            with pytest.raises(TypeError):
                features.extract(changed[0], dataset, changed[1], how, context, tmp_path / "cache")


def test_networks_of_the_same_weights_have_features_and_fits_of_their_own(packed: Path, tmp_path: Path) -> None:
    """A stem of another stride has the same parameters and buffers, and gives other features."""
    found, fits = [], set()
    for stem in ("3x3_s2", "3x3_s1"):
        run = runs.tiny(packed, tmp_path, f"model.stem={stem}")
        with Context(tmp_path) as context:
            judge = Evaluation(run, context, Dataset.open(packed), None)
            found.append((weights.digest(judge.backbone("random").state_dict()), judge._features("random")[0].all()))
            fits.add(judge._job("finetune", "random", None, 0)[0].folder)
    (first, ours), (second, theirs) = found
    assert first == second
    assert not np.allclose(ours, theirs)
    assert len(fits) == 2


def test_all_tasks_take_test_images_of_some_classes_for_what_their_names_say(packed: Path, tmp_path: Path) -> None:
    """Of two of four classes, the training images themselves: each is its own nearest neighbour."""
    shutil.copytree(packed.parent / "images", tmp_path / "some", ignore=shutil.ignore_patterns("class0", "class2"))
    some = shards.pack(str(tmp_path / "some"), tmp_path / "some-packed")
    run = runs.tiny(packed, tmp_path, *FIT, "eval.neighbours=1", f"eval.test_source={some}", "train.precision=float32")
    with Context(tmp_path) as context:
        judge = Evaluation(run, context, Dataset.open(packed), Dataset.open(some))
        assert judge.figure("knn", "random", None, 0) == {"accuracy": 1.0}
        assert judge.online(judge.backbone("random")) == {"knn": 1.0}
        assert judge.figure("retrieval", "random", None, 0)["recall_at_1"] == 1.0
        assert judge.figure("linear", "random", None, 0)["accuracy"] > 0.8
        assert 0.5 <= judge.figure("cluster", "random", None, 0)["accuracy"] <= 1
        fitting = judge._fitting("finetune", "random", *judge._job("finetune", "random", None, 0))
        known = {
            int(i): int(label)
            for b in fitting._test_batches(fitting.job.test_ids)
            for i, label in zip(b["id"], b["label"], strict=True)
        }
        keys = Dataset.open(some).keys(np.array(list(known)))
        assert [f"class{label}" for label in known.values()] == [key.partition("/")[0] for key in keys]
        assert set(known.values()) == {1, 3}
        judge.trained = method.build(run)
        judge._draw("pretrained", clusters=False)
        kept = np.load(tmp_path / pictures.FOLDER / pictures.PROJECTOR)
        assert {str(kept["classes"][label]) for label in kept["labels"]} == {"class1", "class3"}


def test_features_are_not_kept_while_a_tar_cannot_be_read(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.tiny(packed, tmp_path)
    dataset, backbone, read = Dataset.open(packed), method.build(run).evaluated(), store.LocalStore.read
    ids, how = dataset.ids_with("label"), features.Extraction.of_run(run, torch.device("cpu"))

    def stale(self: store.LocalStore, shard: int, offset: int, size: int) -> bytes:
        if offset == dataset.rows(ids[:1]).offset[0]:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(self, shard, offset, size)

    with Context(tmp_path) as context:
        with monkeypatch.context() as broken:
            broken.setattr(store.LocalStore, "read", stale)
            with pytest.raises(RunError, match=r"\.tar: cannot be read: .*Stale file handle"):
                features.extract(backbone, dataset, ids, how, context, tmp_path / "cache")
        found = features.extract(backbone, dataset, ids, how, context, tmp_path / "cache")
    assert np.array_equal(found.ids, ids)


@pytest.mark.parametrize("kept", [True, False])
def test_features_of_too_few_images_are_refused(tmp_path: Path, kept: bool) -> None:
    dataset = Dataset.open(runs.packed(tmp_path, num=40))
    for sample in range(4):
        planted.overwrite(dataset, sample, bytes(dataset.rows(np.array([sample])).size[0]))
    cache, ids = tmp_path / "cache" if kept else None, dataset.ids_with("label")
    run = runs.tiny(tmp_path / "packed", tmp_path, "data.max_bad_fraction=0.1")
    backbone, how = method.build(run).evaluated(), features.Extraction.of_run(run, torch.device("cpu"))
    with Context(tmp_path) as context:
        told = (
            r"^4 of the 40 samples of .*packed seen are bad, more than data\.max_bad_fraction=0\.09; the log names them"
        )
        with pytest.raises(RunError, match=told):
            features.extract(backbone, dataset, ids, replace(how, max_bad_fraction=0.09), context, cache)
        assert len(features.extract(backbone, dataset, ids, how, context, cache)) == 36


def test_few_labels_of_many_images_are_held_to_the_same_share(tmp_path: Path) -> None:
    dataset = Dataset.open(runs.packed(tmp_path, num=400))
    for sample in range(3):
        planted.overwrite(dataset, sample, bytes(dataset.rows(np.array([sample])).size[0]))
    run = runs.tiny(tmp_path / "packed", tmp_path)
    backbone, how = method.build(run).evaluated(), features.Extraction.of_run(run, torch.device("cpu"))
    with Context(tmp_path) as context, pytest.raises(RunError, match=r"^3 of the 12 samples of .* seen are bad"):
        features.extract(backbone, dataset, np.arange(12), how, context)


def test_what_is_unreadable_by_now_is_grey_in_pictures(packed: Path, tmp_path: Path) -> None:
    """Features are kept, so that an evaluation may go on without the image they are of."""
    run = runs.tiny(packed, tmp_path, 'eval.tasks=["knn"]')
    dataset = Dataset.open(packed)
    test = needs.labelled(run, dataset, None, "label").test_ids
    with Context(tmp_path) as context:
        judge = Evaluation(run, context, dataset, None)
        judge.trained = method.build(run)
        judge._features("pretrained")
        with pytest.MonkeyPatch.context() as patch:
            crops = features.crops
            gone = {int(test[0])}
            patch.setattr(features, "crops", lambda *given: {i: x for i, x in crops(*given).items() if i not in gone})
            judge._draw("pretrained", clusters=True)
        kept = np.load(tmp_path / pictures.FOLDER / pictures.PROJECTOR)
        assert len(kept["x"]) == len(kept["thumbnails"]) == len(test) - 1
    assert len(list((tmp_path / pictures.FOLDER).glob("*.png"))) == 2


def test_rows_of_features_are_written_without_a_mapping_and_are_on_the_disk(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared file system takes a mapping's pages back whole: another host's row in a page would be lost."""
    run, whole = runs.tiny(packed, tmp_path), features.share
    written: list[str] = []
    synced: list[int] = []

    def watched(*args: Any) -> Iterator[Any]:
        for found in whole(*args):
            yield found
            maps = Path("/proc/self/maps").read_text().splitlines()
            written.extend(line for line in maps if line.endswith(features.ROWS) and "w" in line.split()[1])

    def fsync(file: int) -> None:
        if os.path.samestat(os.fstat(file), next(tmp_path.glob(f"cache/*/{features.ROWS}")).stat()):
            assert not list(tmp_path.glob(f"cache/*/{features.META}"))  # which says that the rows are there
            synced.append(file)

    monkeypatch.setattr(features, "BATCH_SIZE", 8)
    monkeypatch.setattr(features, "share", watched)
    monkeypatch.setattr(os, "fsync", fsync)
    dataset, backbone = Dataset.open(packed), method.build(run).evaluated()
    with Context(tmp_path) as context:
        how = features.Extraction.of_run(run, context.device)
        features.extract(backbone, dataset, dataset.ids_with("label"), how, context, tmp_path / "cache")
    assert not written
    assert len(synced) == 1


def test_features_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = features.Features(np.arange(8), np.arange(8) % 2, np.ones((8, 1024), np.float32), np.arange(8))
    monkeypatch.setattr(features, "_free_memory", lambda: 48 << 10)
    with pytest.raises(features.ConfigError, match=r"eval.labels: 8 features take"):
        found.all()


def test_a_linear_probe_separates_what_is_separable(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    x = (np.eye(3)[y] * 5 + rng.normal(size=(300, 3))).astype(np.float32)
    found = features.Features(np.arange(300), y, x, np.arange(300))
    scores = classify.linear(
        found.only(np.arange(200)), found.only(np.arange(200, 300)), inverse_l2=1, context=Context(tmp_path)
    )
    assert scores["accuracy"] > 0.95
    assert scores["macro_f1"] == pytest.approx(scores["accuracy"], abs=0.03)
