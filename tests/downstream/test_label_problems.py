"""Evaluations on labels that are few, partial or wrong, as a user meets them: by the command line."""

from __future__ import annotations

import functools
import io
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distssl import compare, job, report
from distssl.downstream import pictures, rows
from distssl.downstream.rows import Row, read_summary
from distssl.errors import ConfigError
from tests import annotated, runs
from tests.conftest import Said

Command = Callable[..., Said]

FIT = ["eval.fit.steps=2", "eval.fit.batch=8", "eval.fit.size_px=32", "eval.num_seeds=2", "eval.backbones=[random]"]


def settings(source: Path, storage: Path, *overrides: str) -> list[str]:
    return runs.command_line(source, storage, "train.epochs=1", "eval.tasks=[]", "name=mine", *overrides)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with every kind of annotation and no class."""
    return annotated.images(tmp_path_factory.mktemp("marked") / "marked", 20)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with classes and nothing else."""
    return runs.photos(tmp_path_factory.mktemp("photos") / "photos", num=64)


@pytest.fixture
def run(command: Command, marked: Path, tmp_path: Path) -> Path:
    """The folder of a run on images that have no class."""
    code, _, err = command(*settings(marked, tmp_path / "runs"))
    assert code == 0, err
    return tmp_path / "runs" / "mine"


def evaluated(command: Command, run: Path, task: str, *overrides: str) -> list[Row]:
    code, _, err = command("evaluate", run, "--task", task, *FIT, *overrides)
    assert code == 0, err
    return read_summary(run)


def check_refused(said: Said, told: str) -> None:
    code, _, err = said
    assert (code, len(err)) == (2, 1), err
    assert err[0].startswith("error: ")
    assert told in err[0], err[0]


def without(folder: Path, to: Path, kind: str) -> Path:
    """A copy that lacks one kind of annotation."""
    return shutil.copytree(folder, to, ignore=shutil.ignore_patterns(f"*.{kind}.*"))


def test_all_does_what_there_are_labels_for_and_names_the_rest(
    command: Command, run: Path, marked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To train on and to test on: the test images have no boxes."""
    caplog.set_level(logging.INFO)
    test = without(marked, tmp_path / "test", "boxes")
    found = evaluated(command, run, "all", f"eval.source={marked}", f"eval.test_source={test}")
    assert {row.task for row in found} == {"segment", "depth", "keypoints"}
    (named,) = [record.getMessage() for record in caplog.records if "not evaluated" in record.getMessage()]
    assert "knn (class subfolders" in named
    assert "detect (KEY.boxes.json beside each image)" in named
    assert "segment" not in named
    said = command("evaluate", run, "--task", "detect", f"eval.source={marked}", f"eval.test_source={test}")
    check_refused(said, "eval.test_source: has no images with boxes; KEY.boxes.json beside each image are right")


def test_a_class_that_only_test_images_have_is_a_class(
    command: Command, run: Path, marked: Path, tmp_path: Path
) -> None:
    test = shutil.copytree(marked, tmp_path / "test")
    for path in test.glob("00*.mask.png"):
        mask = np.asarray(Image.open(path))
        file = io.BytesIO()
        Image.fromarray((2 * mask).astype(np.uint8)).save(file, "PNG")
        path.write_bytes(file.getvalue())
    found = evaluated(command, run, "segment", f"eval.source={marked}", f"eval.test_source={test}")
    assert all(0 < row.value < 1 for row in found)
    said = command("evaluate", run, "--task", "segment", f"eval.test_source={test}", "eval.num_classes=2")
    check_refused(said, "eval.num_classes=2: ")
    check_refused(said, "00: has class 2 in its mask; classes below 2 (255 is none), or at least eval.num_classes=3")


def boxed(marked: Path, to: Path, box: list[float], label: int = 0) -> Path:
    folder = shutil.copytree(marked, to)
    (folder / "003.boxes.json").write_text(json.dumps([{"label": label, "box": box}]))
    return folder


@pytest.mark.parametrize(
    ("box", "label", "told"),
    [
        ([10, 10, 500, 30], 0, "003: box [10.0, 10.0, 500.0, 30.0] lies outside the image of 113x61"),
        ([10, 10, 10, 30], 0, "003: box [10.0, 10.0, 10.0, 30.0] has no extent"),
        ([10, 10, 20, 30], -1, "003: box [10.0, 10.0, 20.0, 30.0] has a label below 0"),
        ([10, 10, 20, 30], 7, "eval.num_classes=3: "),
    ],
)
def test_wrong_boxes_are_told_before_anything_is_trained(
    command: Command, marked: Path, tmp_path: Path, box: list[float], label: int, told: str
) -> None:
    wrong = boxed(marked, tmp_path / "wrong", box, label)
    storage = tmp_path / "runs"
    said = command(*settings(marked, storage, f"eval.source={wrong}", "eval.tasks=[detect]", "eval.num_classes=3"))
    check_refused(said, told)
    assert not (storage / "mine").exists()


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("segment", "has no images with mask; KEY.mask.png beside each image are right"),
        ("depth", "has no images with depth; KEY.depth.png beside each image are right"),
        ("keypoints", "has no images with keypoints; KEY.keypoints.json beside each image are right"),
    ],
)
def test_a_task_that_the_images_have_no_labels_for_is_told(
    command: Command, run: Path, photos: Path, task: str, told: str
) -> None:
    check_refused(command("evaluate", run, "--task", task, f"eval.source={photos}"), f"eval.source: {told}")
    check_refused(command("evaluate", run, "--task", "knn"), "has no labels; say eval.source=LABELLED_IMAGES")


def test_labels_of_the_pretraining_images_that_are_too_few_are_told_as_theirs(
    command: Command, marked: Path, tmp_path: Path
) -> None:
    source = without(marked, tmp_path / "source", "boxes")
    shutil.copy(marked / "003.boxes.json", source)
    said = command(*settings(source, tmp_path / "runs", "eval.test_source=null", "eval.tasks=[detect]"))
    check_refused(said, "data.source: its 1 images with boxes are too few to hold a fifth out for the test")


def test_masks_that_a_method_or_task_needs_are_missed_before_the_training(
    command: Command, marked: Path, photos: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "runs"
    said = command(*settings(photos, storage, "method.name=segsort", "method.segments=supervised"))
    check_refused(said, "has no masks; KEY.mask.png beside each image is right")
    unmasked = without(marked, tmp_path / "unmasked", "mask")
    said = command(*settings(marked, storage, f"eval.test_source={unmasked}", "eval.tasks=[segment]"))
    check_refused(said, "eval.test_source: has no images with mask")
    assert not (storage / "mine").exists()


def test_more_classes_than_a_method_was_built_for_are_told(command: Command, photos: Path, tmp_path: Path) -> None:
    said = command(*settings(photos, tmp_path / "runs", "method.name=uda", "method.num_classes=3"))
    check_refused(said, "method.num_classes=3: the labelled images have 4 classes; 4 is right")
    assert not (tmp_path / "runs" / "mine").exists()


@pytest.mark.parametrize("asked", ["eval.source", "data.source"])
def test_test_images_that_are_those_to_train_on_are_told_before_the_training(
    command: Command, photos: Path, tmp_path: Path, asked: str
) -> None:
    copied = shutil.copytree(photos, tmp_path / "copied")
    of_eval = [f"eval.source={photos}"] if asked == "eval.source" else []
    source = runs.photos(tmp_path / "other", num=32, seed=1) if of_eval else photos
    for test in (photos, copied):
        places = runs.command_line(source, tmp_path / "runs", *of_eval, f"eval.test_source={test}", "name=mine")
        said = command(*places, "eval.tasks=[knn]")
        check_refused(said, f"eval.test_source={test}: has the images of {asked}; leave it out")
    assert not (tmp_path / "runs" / "mine").exists()


def test_an_evaluation_on_labels_of_their_own_needs_nothing_of_the_pretraining_data(
    command: Command, photos: Path, tmp_path: Path
) -> None:
    source = runs.photos(tmp_path / "other", num=32, seed=1)
    assert command(*settings(source, tmp_path / "runs"))[0] == 0
    shutil.rmtree(source)
    evaluated(command, tmp_path / "runs" / "mine", "knn", f"eval.source={photos}", f"machine.cache={tmp_path / 'new'}")


@pytest.mark.parametrize("name", ["{}", "{}/.", "{}/../photos"])
def test_labels_that_the_method_learns_from_are_no_test(
    command: Command, photos: Path, tmp_path: Path, name: str
) -> None:
    learns = ["method.name=uda", "method.num_classes=4", f"eval.source={runs.photos(tmp_path / 'other', num=32)}"]
    test = f"eval.test_source={name.format(photos)}"
    said = command(*settings(photos, tmp_path / "runs", *learns, test), "eval.tasks=[knn]")
    check_refused(said, "eval.test_source: labels that the method does not learn from are right")
    assert not (tmp_path / "runs" / "mine").exists()


def test_labels_are_asked_for_of_methods_that_learn_from_some(command: Command, photos: Path, tmp_path: Path) -> None:
    said = command(*settings(photos, tmp_path / "runs", "data.num_labelled=5"))
    check_refused(said, "data.num_labelled=5: simclr learns from no labels; leave it out")


def test_a_single_label_is_enough(command: Command, run: Path, photos: Path) -> None:
    found = evaluated(command, run, "knn,linear,finetune", f"eval.source={photos}", "eval.labels=[1]")
    assert {row.task for row in found} == {"knn", "linear", "finetune"}
    assert all(0 <= value < 0.7 for row in found for value in row.values)  # one class of four is never wrong


def test_labels_of_one_number_chosen_in_two_ways_are_two_rows(command: Command, run: Path, photos: Path) -> None:
    found = evaluated(command, run, "knn", f"eval.source={photos}", 'eval.labels=[8, "2/class", "15.5%", null, 1000]')
    chosen = {(row.labels, row.per_class): row for row in found}
    assert len(chosen) == len(found) == 3
    assert set(chosen) == {(8, None), (8, 2), (None, None)}
    assert [column.amount for column in compare.collect([run]).columns] == ["8", "2/class", "all"]


def test_data_sets_of_one_name_have_rows_of_their_own(
    command: Command, run: Path, photos: Path, tmp_path: Path
) -> None:
    other = runs.photos(tmp_path / "elsewhere" / "photos", num=48, seed=1)
    for source in (photos, other, photos):
        found = evaluated(command, run, "knn", f"eval.source={source}", "eval.labels=[null]")
    assert {row.data for row in found} == {"photos"}
    assert len(found) == 2
    assert len({row.value for row in found}) == 2
    names = {row.data for row in rows.told_apart(found)}
    assert len(names) == 2
    assert {column.data for column in compare.collect([run]).columns} == names
    assert report.table(found).row_count == 2


def test_clusters_are_made_where_they_were_asked_for(command: Command, run: Path, photos: Path) -> None:
    drawn = run / pictures.FOLDER
    evaluated(command, run, "knn", f"eval.source={photos}", "eval.labels=[null]")
    assert [path.name for path in drawn.glob("*_photos_*")] == ["neighbours_photos_random.png"]
    evaluated(command, run, "cluster", f"eval.source={photos}")
    assert (drawn / "clusters_photos_random.png").exists()


def test_masks_that_a_method_has_learnt_from_are_no_test(
    command: Command, marked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = "eval.test_source: masks that the method does not learn from are right"
    learns = ["method.name=segsort", "method.segments=supervised", "train.lr=0.001"]
    check_refused(command(*settings(marked, tmp_path / "runs", *learns, "eval.tasks=[segment]")), told)
    said = command(
        *settings(f"{marked}/.", tmp_path / "runs", *learns, "eval.tasks=[segment]", f"eval.source={marked}")
    )
    check_refused(said, told)
    assert not (tmp_path / "runs" / "mine").exists()
    assert command(*settings(marked, tmp_path / "runs", *learns))[0] == 0
    run = tmp_path / "runs" / "mine"
    check_refused(command("evaluate", run, "--task", "segment", *FIT), told)
    caplog.set_level(logging.INFO)
    assert command("evaluate", run, "--task", "all", *FIT)[0] == 0
    assert "segment (masks that the method does not learn from)" in caplog.text
    assert {row.task for row in read_summary(run)} == {"detect", "depth", "keypoints"}
    other = annotated.images(tmp_path / "other", 8)
    assert "segment" in {row.task for row in evaluated(command, run, "segment", f"eval.test_source={other}")}


def test_batches_that_the_workers_cannot_share_are_told_before_the_training(photos: Path, tmp_path: Path) -> None:
    fit = ["eval.tasks=[finetune]", "eval.fit.batch=8", "eval.labels=[null]"]
    tiny = functools.partial(runs.tiny, photos, tmp_path)
    with pytest.raises(ConfigError, match=r"eval\.fit\.batch=8, for \d\d labels: 16 workers cannot share it"):
        job.prepare(tiny(*fit), 16)
    with pytest.raises(ConfigError, match=r"eval\.fit\.batch=2, for 3 labels: 4 workers cannot share it"):
        job.prepare(tiny(*fit[:2], "eval.labels=[null,3]"), 4)
    with pytest.raises(ConfigError, match=r"eval\.fit\.batch=8"):  # the supervised backbone is a network of finetune
        job.prepare(tiny("eval.tasks=[knn]", "eval.backbones=[supervised]", *fit[1:]), 16)
    few = ["eval.tasks=[linear]", "eval.backbones=[supervised]", fit[1], "eval.labels=[3]"]
    job.prepare(tiny("name=all", *few), 4)  # where it is no task itself it learns from all labels, and 4 share 8
    job.prepare(tiny("eval.tasks=[knn]", *fit[1:]), 16)
    job.prepare(tiny("name=other", *fit), 8)
