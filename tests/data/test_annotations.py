"""Annotations: found in tars, packed from beside their images, read with them, and missed without harm."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import fn, types
from PIL import Image

from distssl.data import annotations, augment, index_parts, indexing, packing, shards
from distssl.data.annotations import KINDS, MEMBERS
from distssl.data.loader import Loader, Request
from distssl.data.quarantine import Quarantine
from distssl.data.sample import Sample
from distssl.data.shards import Dataset
from distssl.errors import ConfigError, RunError
from tests import planted

SIZES = [(40, 30), (30, 40), (36, 36)]  # width, height
NUM = len(SIZES) + 1  # the last one has no annotation


def mask(number: int, size: tuple[int, int]) -> np.ndarray:
    """Class `number` left, class 7 right of the middle, none in the first row."""
    array = np.full((size[1], size[0]), number, np.uint8)
    array[:, size[0] // 2 :] = 7
    array[0] = annotations.NO_CLASS
    return array


def depth(number: int, size: tuple[int, int]) -> np.ndarray:
    """Any of the 65,536 distances, the least and the largest among them."""
    array = np.random.default_rng(number).integers(0, 1 << 16, (size[1], size[0]), dtype=np.uint16)
    array[0, :3] = 0, 1, 65_535
    return array


def annotation(kind: str, number: int) -> bytes:
    size = SIZES[number]
    if kind in ("mask", "depth"):
        return planted.encode(mask(number, size) if kind == "mask" else depth(number, size))
    boxes = [{"label": i, "box": [i, 1.5, 9, 1e4], "crowd": False} for i in range(number)]
    points = [[-3, 1e6, 0], *([i, i + 0.5, 1] for i in range(number))]
    return json.dumps(boxes if kind == "boxes" else points).encode()  # of the first image: an empty list of boxes


def planted_members() -> dict[str, bytes]:
    found = {}
    for i, size in enumerate(SIZES):
        found[f"k{i}.png"] = planted.picture(i, size=size)
        found |= {f"k{i}.{MEMBERS[kind]}": annotation(kind, i) for kind in KINDS}
    return found | {"k3.jpg": planted.picture(3, "JPEG", size=(32, 33))}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    planted.write_tar(tmp_path / "a.tar", list(planted_members().items()))
    return Dataset.open(shards.index(str(tmp_path)))


def test_an_index_says_where_annotations_lie(dataset: Dataset) -> None:
    whole = dataset.shard_paths[0].read_bytes()
    ids = np.array([2, 0, 3, 1])
    rows = dataset.rows(ids, KINDS)
    assert dataset.num_annotated == dict.fromkeys(KINDS, 3)
    for kind in KINDS:
        offset, size = rows.annotation_offset[kind], rows.annotation_size[kind]
        assert offset.dtype == size.dtype == np.int64
        expected = [annotation(kind, i) if i < 3 else None for i in ids]
        assert [whole[a : a + n] if n else None for a, n in zip(offset, size, strict=True)] == expected
        assert annotations.read(dataset, ids, kind) == expected
        for chunk in (1, 3, 1 << 20):
            found = dataset.ids_with(kind, chunk)
            assert (found.tolist(), found.dtype) == ([0, 1, 2], np.int64)


def test_rows_hold_the_kinds_that_were_asked_for(dataset: Dataset) -> None:
    assert dataset.rows(np.arange(3)).annotation_offset == {}
    rows = dataset.rows(np.arange(3), ("boxes",))
    assert list(rows.annotation_offset) == list(rows.annotation_size) == ["boxes"]


def test_a_shard_that_was_cut_since_is_told_when_annotations_are_read(dataset: Dataset) -> None:
    path = dataset.shard_paths[0]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(RunError, match=r"a\.tar: cannot be read"):
        annotations.read(dataset, np.arange(NUM), "keypoints")


GREY = np.zeros((4, 6), np.uint8)
BAD = [
    ("mask", b"no image", "not an image"),
    ("mask", planted.encode(GREY[:3]), "6x3 pixels where the image has 6x4"),
    ("mask", planted.encode(GREY, "BMP"), "bmp, not png"),
    ("mask", planted.encode(GREY, mode="P"), "8-bit palette where 8-bit grey"),
    ("mask", planted.encode(GREY, mode="1"), "1-bit grey where 8-bit grey"),
    ("mask", planted.encode(GREY, mode="RGB"), "8-bit RGB where 8-bit grey"),
    ("mask", planted.encode(GREY)[:24], "cut"),
    ("depth", b"", "zero bytes"),
    ("depth", planted.encode(GREY.T.astype(np.uint16)), "4x6 pixels"),
    ("depth", planted.encode(GREY), "8-bit grey where 16-bit grey"),
    ("boxes", b"", "not JSON"),
    ("boxes", b"\xff\xfe", "not JSON"),
    ("boxes", b"[" * 100_000, "not JSON"),
    ("boxes", b'{"label": 1, "box": [0, 0, 1, 1]}', "not a list"),
    ("boxes", b"[[0, 0, 1, 1]]", 'not {"label"'),
    ("boxes", b'[{"box": [0, 0, 1, 1]}]', 'not {"label"'),
    ("boxes", b'[{"label": "1", "box": [0, 0, 1, 1]}]', "label is no integer"),
    ("boxes", b'[{"label": 1.0, "box": [0, 0, 1, 1]}]', "label is no integer"),
    ("boxes", b'[{"label": true, "box": [0, 0, 1, 1]}]', "label is no integer"),
    ("boxes", b'[{"label": 1, "box": [0, 0, 1]}]', "four finite numbers"),
    ("boxes", b'[{"label": 1, "box": [0, 0, 1, NaN]}]', "four finite numbers"),
    ("boxes", b'[{"label": 1, "box": [0, 0, 1, -Infinity]}]', "four finite numbers"),
    ("boxes", b'[{"label": 1, "box": [0, 0, 1, 1e39]}]', "four finite numbers"),
    ("boxes", b'[{"label": 1, "box": [0, 0, 1, 1' + b"0" * 400 + b"]}]", "four finite numbers"),
    ("keypoints", b"[[1, 2, 1], [3, 4]]", "[3, 4]: not three finite numbers"),
    ("keypoints", b"[[1, null, 0]]", "not three finite numbers"),
    ("keypoints", b"[[1, 2, 2]]", "visible is neither 0 nor 1"),
    ("keypoints", b"[1, 2, 1]", "1: not three"),
]


@pytest.mark.parametrize(("kind", "data", "reason"), BAD)
def test_what_is_no_annotation_is_told(kind: str, data: bytes, reason: str) -> None:
    assert reason in (annotations.problem(kind, data, 4, 6) or "")


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_mask_has_the_size_of_the_upright_image(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = planted.picture(0, "JPEG", size=(6, 4), exif=exif)
    upright = GREY if orientation == 1 else GREY.T
    planted.write_tar(tmp_path / "a.tar", [("a.jpg", image), ("a.mask.png", planted.encode(upright))])
    planted.write_tar(tmp_path / "b.tar", [("b.jpg", image), ("b.mask.png", planted.encode(upright.T))])
    assert Dataset.open(shards.index(str(tmp_path))).ids_with("mask").tolist() == [0]


def test_bad_annotations_are_counted_and_named_and_their_images_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for shard, name in enumerate(("a", "b")):
        members = []
        for i, (kind, data, _) in enumerate(BAD[shard::2]):
            members += [(f"{name}{i}.png", planted.picture(i, size=(6, 4))), (f"{name}{i}.{MEMBERS[kind]}", data)]
        planted.write_tar(tmp_path / f"{name}.tar", members)
    for _ in range(2):  # scanned, and from the parts
        caplog.clear()
        dataset = Dataset.open(shards.index(str(tmp_path)))
        assert dataset.num_samples == len(BAD)
        assert dataset.num_annotated == dict.fromkeys(KINDS, 0)
        described = json.loads((tmp_path / indexing.DATASET).read_text())
        assert described["bad_annotations"] == {kind: sum(kind == bad[0] for bad in BAD) for kind in KINDS}
        assert described["rejected"]["count"] == 0
        named = [line for line in caplog.messages if " without its " in line]
        assert len(named) == index_parts.FIRST_NAMED
        assert named[0].endswith(f"kept a0 of a.tar without its mask: {annotations.problem(*BAD[0][:2], 4, 6)}")
        assert caplog.messages[-1].endswith("4 samples are kept without their .keypoints.json")


def mask_views(sample: Sample) -> dict[str, Any]:
    image, classes = augment.crop_with_mask(sample, augment.Crop(resize_px=30, size_px=30))
    return {"image": image, "mask": classes}


def depth_views(sample: Sample) -> dict[str, Any]:
    return {
        "depth": fn.crop(fn.cast(sample.depth(), dtype=types.INT32), crop_h=30, crop_w=30, crop_pos_x=0, crop_pos_y=0)
    }


def batch(dataset: Dataset, target: str, bad: Quarantine) -> dict[str, torch.Tensor]:
    views = {"mask": mask_views, "depth": depth_views}[target]
    loader = Loader(dataset, views, seed=0, batch_size=8, threads=1, max_pixels=10**6, quarantine=bad, target=target)
    return next(iter(loader.batches(iter([Request(np.arange(NUM))]))))


def test_a_mask_comes_with_its_image_and_an_image_without_one_has_no_class_anywhere(dataset: Dataset) -> None:
    got = batch(dataset, "mask", Quarantine())
    assert got["mask"].shape == (NUM, 1, 30, 30)
    for i in range(3):
        assert set(got["mask"][i].unique().tolist()) <= {i, 7, annotations.NO_CLASS}
        assert {i, 7} <= set(got["mask"][i].unique().tolist())
    assert (got["mask"][3] == annotations.NO_CLASS).all()


def test_depth_comes_without_loss_and_an_image_without_it_has_none(dataset: Dataset) -> None:
    got = batch(dataset, "depth", Quarantine())["depth"]
    assert got.shape == (NUM, 1, 30, 30)
    for i, size in enumerate(SIZES):
        np.testing.assert_array_equal(got[i, 0], depth(i, size)[:30, :30].astype(np.int32))
    assert (got[3] == annotations.NO_DEPTH).all()


@pytest.mark.parametrize("kind", ["mask", "depth"])
def test_a_blank_annotation_is_one(kind: str) -> None:
    assert annotations.problem(kind, annotations.blank(kind, 5, 9), 5, 9) is None


@pytest.mark.parametrize("kind", ["mask", "depth"])
def test_a_target_that_was_damaged_since_puts_its_sample_into_quarantine(dataset: Dataset, kind: str) -> None:
    rows = dataset.rows(np.array([1]), (kind,))
    with open(dataset.shard_paths[0], "r+b") as file:
        file.seek(int(rows.annotation_offset[kind][0]))
        file.write(bytes(int(rows.annotation_size[kind][0])))
    bad = Quarantine()
    assert batch(dataset, kind, bad)["id"].tolist() == [0, 2, 3]
    assert [sample for _, sample in bad.entries] == [1]


@pytest.mark.parametrize("source_kind", ["folder", "zip"])
def test_pack_takes_the_annotations_that_lie_beside_images(
    tmp_path: Path, source_kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = {f"{'a' if name < 'k2' else 'b'}/{name}": data for name, data in planted_members().items()}
    found["b/K2.Boxes.JSON"] = found.pop("b/k2.boxes.json")
    orphans = [f"b/orphan.{MEMBERS[kind]}" for kind in KINDS]
    found |= dict.fromkeys(orphans, b"anything")
    if source_kind == "folder":
        source = tmp_path / "photos"
        for name, data in found.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
    else:
        source = tmp_path / "photos.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for name, data in found.items():
                archive.writestr(f"top/{name}", data)
    dataset = Dataset.open(packing.pack(str(source), tmp_path / "out"))
    assert (dataset.num_samples, dataset.num_labelled, dataset.classes) == (NUM, NUM, ("a", "b"))
    assert dataset.num_annotated == dict.fromkeys(KINDS, 3)
    left_out = [line for line in caplog.messages if "left out" in line]
    for name, kind in zip(orphans, KINDS, strict=True):
        assert sum(name in line and f"{kind} without its image" in line for line in left_out) == 1
    assert len(left_out) == len(KINDS)
    ids = np.arange(NUM)
    order = [int(key[-1]) for key in dataset.keys(ids)]
    for kind in KINDS:
        assert annotations.read(dataset, ids, kind) == [annotation(kind, i) if i < 3 else None for i in order]
    with tarfile.open(dataset.shard_paths[0]) as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"png", "jpg", "cls", *MEMBERS.values()}


@pytest.mark.parametrize("change", ["none", "rewritten", "of another kind"])
def test_pack_goes_on_only_where_the_annotations_are_the_same(tmp_path: Path, change: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(planted.picture(0))
    path = tmp_path / "photos/a.boxes.json"
    path.write_bytes(b"[]")
    packing.pack(str(tmp_path / "photos"), tmp_path / "out")
    if change == "rewritten":
        path.write_bytes(b"[ ]")
    elif change == "of another kind":
        path.rename(path.with_name("a.keypoints.json"))
    if change == "none":
        packing.pack(str(tmp_path / "photos"), tmp_path / "out")
    else:
        with pytest.raises(ConfigError, match="before it changed"):
            packing.pack(str(tmp_path / "photos"), tmp_path / "out")
