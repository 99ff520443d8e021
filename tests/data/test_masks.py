"""Masks: found in tars, packed from beside their images, read with them, and missed without harm."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distssl.data import augment, images, packing, shards, tars
from distssl.data.loader import Loader, Request
from distssl.data.quarantine import Quarantine
from distssl.data.sample import Sample
from distssl.data.shards import Dataset
from tests import planted

SIZES = [(40, 30), (30, 40), (36, 36)]  # width, height


def mask(number: int, size: tuple[int, int]) -> bytes:
    """Class `number` left, class 7 right of the middle, none in the first row."""
    array = np.full((size[1], size[0]), number, np.uint8)
    array[:, size[0] // 2 :] = 7
    array[0] = images.NO_CLASS
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def planted_members() -> dict[str, bytes]:
    """Three images with masks of their sizes, one without, one whose mask has another size, one whose mask is none."""
    found: dict[str, bytes] = {}
    for i, size in enumerate(SIZES):
        found |= {f"k{i}.png": planted.picture(i, size=size), f"k{i}.mask.png": mask(i, size)}
    found["k3.jpg"] = planted.picture(3, "JPEG", size=(32, 32))
    found |= {"k4.png": planted.picture(4, size=(32, 32)), "k4.mask.png": mask(4, (31, 32))}
    found |= {"k5.png": planted.picture(5, size=(32, 32)), "k5.mask.png": b"no image"}
    return found


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    planted.write_tar(tmp_path / "a.tar", list(planted_members().items()))
    return Dataset.open(shards.index(str(tmp_path)))


def test_an_index_says_where_masks_lie_and_leaves_out_those_that_are_none(dataset: Dataset) -> None:
    rows = dataset.rows(np.arange(6))
    whole = dataset.shard_paths[0].read_bytes()
    for i in range(3):
        start = int(rows.mask_offset[i])
        assert whole[start : start + int(rows.mask_size[i])] == planted_members()[f"k{i}.mask.png"]
    assert rows.mask_size[3:].tolist() == [0, 0, 0]
    assert dataset.num_masks == 3
    assert tars.scan(dataset.shard_paths[0], max_pixels=10**6).bad_masks == 2


def views(sample: Sample) -> dict[str, Any]:
    image, classes = augment.crop_with_mask(sample, augment.Crop(resize_px=30, size_px=30))
    return {"image": image, "mask": classes}


def batch(dataset: Dataset, bad: Quarantine) -> dict[str, torch.Tensor]:
    loader = Loader(dataset, views, seed=0, batch_size=6, threads=1, max_pixels=10**6, quarantine=bad, masks=True)
    return next(iter(loader.batches(iter([Request(np.arange(6))]))))


def test_a_mask_comes_with_its_image_and_an_image_without_one_has_no_class_anywhere(dataset: Dataset) -> None:
    got = batch(dataset, Quarantine())
    assert got["mask"].shape == (6, 1, 30, 30)
    for i in range(3):
        assert set(got["mask"][i].unique().tolist()) <= {i, 7, images.NO_CLASS}
        assert {i, 7} <= set(got["mask"][i].unique().tolist())
    assert (got["mask"][3:] == images.NO_CLASS).all()


def test_a_mask_that_was_damaged_since_puts_its_sample_into_quarantine(dataset: Dataset) -> None:
    rows = dataset.rows(np.array([1]))
    with open(dataset.shard_paths[0], "r+b") as file:
        file.seek(int(rows.mask_offset[0]))
        file.write(bytes(int(rows.mask_size[0])))
    bad = Quarantine()
    assert batch(dataset, bad)["id"].tolist() == [0, 2, 3, 4, 5]
    assert list(bad.entries) == [1]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pack_takes_the_masks_that_lie_beside_images(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = {
        f"{'a' if i < 2 else 'b'}/{name}": data for i, (name, data) in enumerate(planted_members().items()) if i < 6
    }
    files["b/orphan.mask.png"] = mask(0, (8, 8))
    if kind == "folder":
        source = tmp_path / "photos"
        for name, data in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
    else:
        source = tmp_path / "photos.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for name, data in files.items():
                archive.writestr(f"top/{name}", data)
    dataset = Dataset.open(packing.pack(str(source), tmp_path / "out"))
    assert (dataset.num_samples, dataset.num_masks, dataset.num_labelled) == (3, 3, 3)
    assert "orphan.mask.png" in caplog.text
    assert "a mask without its image" in caplog.text
    packed: set[bytes] = set()
    for path in dataset.shard_paths:
        with tarfile.open(path) as tar:
            members = [member for member in tar.getmembers() if member.name.endswith(f".{tars.MASK}")]
            packed |= {file.read() for member in members if (file := tar.extractfile(member))}
    assert packed == {mask(i, size) for i, size in enumerate(SIZES)}
