"""Which labels are chosen, and what the user is told of labels that are wrong."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distssl.data import held_out, shards, store
from distssl.data.shards import Dataset
from distssl.downstream import labels
from distssl.errors import ConfigError
from tests import annotated, planted


def dataset(folder: Path, files: dict[str, bytes]) -> Dataset:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return Dataset.open(shards.pack(str(folder), folder.parent / f"{folder.name}-packed"))


def image(height: int = 40, width: int = 60) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def boxes(*corners: list[float], label: int = 0) -> bytes:
    return json.dumps([{"label": label, "box": box} for box in corners]).encode()


def test_few_labels_are_a_number_a_share_or_so_many_a_class() -> None:
    ids = np.arange(0, 2000, 2)
    classes = np.repeat([0, 1, 2, 3], [700, 250, 45, 5])
    assert np.array_equal(labels.few(ids, classes, None, 0), ids)
    assert len(labels.few(ids, classes, 77, 0)) == 77
    assert len(labels.few(ids, classes, "2.5%", 0)) == 25
    per_class = labels.few(ids, classes, "10/class", 0)
    assert np.bincount(classes[per_class // 2]).tolist() == [10, 10, 10, 5]
    assert (np.diff(per_class) > 0).all()


def test_fewer_labels_of_a_seed_are_part_of_more() -> None:
    ids, classes = np.arange(1000), np.arange(1000) % 7
    for less, more in ((10, 300), ("1%", "30%"), ("2/class", "20/class")):
        few, many = labels.few(ids, classes, less, 3), labels.few(ids, classes, more, 3)
        assert set(few) < set(many)
        assert set(few) != set(labels.few(ids, classes, less, 4))


def test_a_task_without_labels_is_told_what_would_be_right(tmp_path: Path) -> None:
    plain = dataset(tmp_path / "plain", {f"{i}.png": image() for i in range(4)})
    for kind, right in ((labels.LABEL, "class subfolders"), ("mask", "KEY.mask.png"), ("boxes", "KEY.boxes.json")):
        assert not labels.has(plain, kind)
        with pytest.raises(ConfigError, match=f"eval.source: has no .*; {right}"):
            labels.find(plain, None, kind, "plain")


def test_a_label_too_few_to_hold_a_fifth_out_is_told_as_that(tmp_path: Path) -> None:
    parts = set()
    for name in "01":  # by its hash one of the two is to train on, and one to test on
        boxed = dataset(tmp_path / name, {"0.png": image(), "1.png": image(), f"{name}.boxes.json": boxes()})
        parts.add(tuple(len(part) for part in held_out.split(boxed.ids_with("boxes"))))
        with pytest.raises(
            ConfigError, match=r"^data\.source: its 1 images with boxes are too few to hold a fifth out"
        ):
            labels.find(boxed, None, "boxes", "boxed", "data.source")
        assert len(labels.find(boxed, boxed, "boxes", "boxed").train_ids) == 1
    assert parts == {(1, 0), (0, 1)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (boxes([10, 10, 70, 30]), r"box \[10.0, 10.0, 70.0, 30.0\] lies outside the image of 60x40"),
        (boxes([-5, 1, 20, 20]), "lies outside"),
        (boxes([20, 10, 20, 30]), "has no extent"),
        (boxes([1, 1, 5, 5], label=-2), "has a label below 0"),
    ],
)
def test_wrong_boxes_are_named(tmp_path: Path, given: bytes, message: str) -> None:
    found = dataset(tmp_path / "boxed", {f"{i}.png": image() for i in range(3)} | {"1.boxes.json": given})
    with pytest.raises(ConfigError, match=f"1: .*{message}"):
        labels.boxes(found, found.ids_with("boxes"))


def test_boxes_at_the_edge_and_images_without_one_are_right(tmp_path: Path) -> None:
    files = {f"{i}.png": image() for i in range(2)} | {"0.boxes.json": boxes(), "1.boxes.json": boxes([0, 0, 60, 40])}
    found = dataset(tmp_path / "boxed", files)
    read = labels.boxes(found, found.ids_with("boxes"))
    assert sorted(len(of_image.labels) for of_image in read.values()) == [0, 1]
    assert labels.num_classes(labels.find(found, found, "boxes", "boxed"), "boxes", None) == 1


def test_images_with_other_numbers_of_points_are_named(tmp_path: Path) -> None:
    points = {f"{i}.keypoints.json": json.dumps([[1, 1, 1]] * (2 if i else 3)).encode() for i in range(3)}
    found = dataset(tmp_path / "pointed", {f"{i}.png": image() for i in range(3)} | points)
    with pytest.raises(
        ConfigError, match=r"\d: has [23] keypoints, the first image [23]; as many in all of eval\.source"
    ):
        labels.keypoints(found, found.ids_with("keypoints"))


def labelled(folder: Path, classes: str) -> Dataset:
    """Three images a class."""
    for label in classes:
        (folder / label).mkdir(parents=True)
        for i in range(3):
            (folder / label / f"{i}.png").write_bytes(image())
    return Dataset.open(shards.pack(str(folder), folder.with_name(f"{folder.name}-packed")))


def test_test_images_of_other_classes_are_refused(tmp_path: Path) -> None:
    told = r"eval\.test_source: its classes are 2 \(b, c\), those .* 2 \(a, b\); names of these are right, c is none"
    with pytest.raises(ConfigError, match=told):
        labels.find(labelled(tmp_path / "train", "ab"), labelled(tmp_path / "test", "bc"), labels.LABEL, "letters")


@pytest.mark.parametrize("classes", ["ab", "cd", "bd"])
def test_test_images_of_some_classes_have_the_numbers_of_the_training_images(tmp_path: Path, classes: str) -> None:
    train, test = labelled(tmp_path / "train", "abcd"), labelled(tmp_path / "test", classes)
    found = labels.find(train, test, labels.LABEL, "letters").test
    every = np.arange(test.num_samples)
    folders = [key.rpartition("/")[0] for key in test.keys(every)]
    assert found.classes == train.classes
    assert found.rows(every).label.tolist() == ["abcd".index(name) for name in folders]
    assert found.rows(every).label.dtype == test.rows(every).label.dtype
    assert np.array_equal(found.ids_with(labels.LABEL), test.ids_with(labels.LABEL))
    assert test.classes == tuple(classes)  # as it was
    assert test.rows(every).label.max() == len(classes) - 1


def test_numbered_test_images_without_the_highest_class_are_right(tmp_path: Path) -> None:
    """Tars have classes 0 to the largest that occurs; an image without a number has no class in both."""

    def numbered(name: str, *classes: int) -> Dataset:
        members = [(f"{i}.cls", str(label).encode()) for i, label in enumerate(classes)]
        members += [(f"{i}.png", planted.picture(i)) for i in range(len(classes) + 1)]
        planted.write_tar(tmp_path / name / "0.tar", sorted(members))
        return Dataset.open(shards.index(str(tmp_path / name)))

    found = labels.find(numbered("train", 0, 3, 1, 2), numbered("test", 0, 2, 1), labels.LABEL, "numbers")
    assert found.test.rows(np.arange(4)).label.tolist() == [0, 2, 1, -1]
    assert found.test_ids.tolist() == [0, 1, 2]


def test_masks_are_read_one_at_a_time_for_their_largest_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Dataset.open(shards.pack(str(annotated.images(tmp_path / "marked", 9)), tmp_path / "packed"))
    data, read, seen = labels.find(found, None, "mask", "marked"), store.LocalStore.read, [0, 0]

    def counted(self: store.LocalStore, shard: int, offset: int, size: int) -> bytes:
        seen[0] += 1
        return read(self, shard, offset, size)

    def largest(mask: bytes) -> int:
        seen[1] += 1
        assert seen[0] == seen[1]  # the ones before are not held
        return seen[1]

    monkeypatch.setattr(store.LocalStore, "read", counted)
    monkeypatch.setattr(labels, "_largest_in_mask", largest)
    assert labels.num_classes(data, "mask", None) == 9 + 1
    assert seen == [9, 9]
