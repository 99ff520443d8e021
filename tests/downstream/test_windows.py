"""Masks, depth, boxes and points stay on what they mark under every window: drawn into images, and read back."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from distssl.context import Context
from distssl.data import shards, windows
from distssl.data.loader import Loader, Request
from distssl.data.quarantine import Quarantine
from distssl.data.sample import Sample
from distssl.data.shards import Dataset
from distssl.data.windows import Window
from distssl.downstream import features, frames, labels
from tests import annotated

NUM = 8
VIEW_PX = 96


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("marked")
    return Dataset.open(shards.pack(str(annotated.images(folder / "images", NUM)), folder / "packed"))


def views(target: str, drawn: bool, sample: Sample) -> dict:
    window = (
        Window.drawn(sample, VIEW_PX, (0.5, 1.1), flip=0.5) if drawn else Window.whole(sample, VIEW_PX)
    )  # above 1: windows that reach beyond the image on all sides
    found = {"image": window.image(), "frame": window.frame()}
    return found | {target: window.classes() if target == "mask" else window.depth()}


def load(dataset: Dataset, target: str, drawn: bool) -> list[dict[str, torch.Tensor]]:
    """The views of all images under many draws."""
    loader = Loader(
        dataset,
        functools.partial(views, target, drawn),
        seed=5,
        batch_size=NUM,
        threads=1,
        max_pixels=10**6,
        quarantine=Quarantine(),
        target=target,
    )
    return list(loader.batches(iter([Request(np.arange(NUM), epoch) for epoch in range(6 if drawn else 1)])))


def red(image: torch.Tensor) -> torch.Tensor:
    """Where a view [3, S, S] shows the object; grey is beyond the image."""
    return (image[0] > 128) & (image[1] < 60)


@pytest.mark.parametrize("drawn", [True, False])
def test_the_mask_marks_the_object_and_nothing_beyond_the_image(dataset: Dataset, drawn: bool) -> None:
    mirrored, beyond_seen = set(), 0
    for batch in load(dataset, "mask", drawn):
        for image, mask, frame in zip(batch["image"], batch["mask"][:, 0], batch["frame"], strict=True):
            beyond = (image.float() - windows.GREY).abs().amax(0) < 2
            mirrored.add(float(frame[4]))
            beyond_seen += int(beyond.sum())
            wrong = (mask == 1) != red(image)
            assert int((wrong & ~edges(mask)).sum()) == 0  # an antialiased edge is neither
            assert float(((mask == 255) != beyond)[~edges(mask)].float().mean()) < 0.001
    assert mirrored == ({0.0, 1.0} if drawn else {0.0})
    assert beyond_seen > 0


def edges(mask: torch.Tensor) -> torch.Tensor:
    """Pixels within two of another class."""
    padded = torch.nn.functional.max_pool2d(mask[None, None].float(), 5, 1, 2)
    low = -torch.nn.functional.max_pool2d(-mask[None, None].float(), 5, 1, 2)
    return (padded != low)[0, 0]


def test_depth_lies_in_the_same_pixels_as_the_mask(dataset: Dataset) -> None:
    lookup = {0: annotated.METRES[0], 1: annotated.METRES[1], 255: 0}
    for masks, depths in zip(load(dataset, "mask", True), load(dataset, "depth", True), strict=True):
        expected = np.vectorize(lookup.get)(masks["mask"].numpy())
        assert np.array_equal(depths["depth"].numpy(), expected)
        assert torch.equal(masks["frame"], depths["frame"])


@pytest.mark.parametrize("drawn", [True, False])
def test_boxes_and_points_follow_the_object(dataset: Dataset, drawn: bool) -> None:
    ids = np.arange(NUM)
    boxes, points = labels.boxes(dataset, ids), labels.keypoints(dataset, ids)
    looked_at = 0
    for batch in load(dataset, "mask", drawn):
        for sample, mask, frame in zip(batch["id"].tolist(), batch["mask"][:, 0], batch["frame"], strict=True):
            (box,) = frames.boxes_into_view(boxes[sample].corners, frame)
            if (box < 1).any() or (box > VIEW_PX - 1).any():
                continue  # cut by the window: its middle in the view is another
            rows, columns = (mask == 1).nonzero().unbind(1)
            seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
            tolerance = 1 + 0.5 * float(frame[3])
            assert torch.allclose(seen, box, atol=tolerance)
            centre = frames.into_view(points[sample][:1, :2], frame)[0]
            middle = torch.stack([columns.float().mean() + 0.5, rows.float().mean() + 0.5])
            assert torch.allclose(middle, centre, atol=tolerance)
            looked_at += 1
    assert looked_at > NUM // 2


def test_what_goes_into_a_view_comes_out_again() -> None:
    generator = torch.Generator().manual_seed(0)
    points = 100 * torch.rand(20, 2, generator=generator)
    corners = torch.cat([points, points + 1 + torch.rand(20, 2, generator=generator)], dim=1)
    for mirror in (0.0, 1.0):
        frame = torch.tensor([-13.0, 7.0, 90.0, 64 / 90, mirror])
        assert torch.allclose(frames.out_of_view(frames.into_view(points, frame), frame), points, atol=1e-4)
        there = frames.boxes_into_view(corners, frame)
        assert (there[:, 0] < there[:, 2]).all()
        assert torch.allclose(frames.boxes_out_of_view(there, frame), corners, atol=1e-4)


def test_the_whole_image_is_in_the_test_window(dataset: Dataset, tmp_path: Path) -> None:
    rows = dataset.rows(np.arange(NUM))
    for batch in load(dataset, "mask", drawn=False):
        for frame, height, width in zip(batch["frame"], rows.height, rows.width, strict=True):
            corners = frames.into_view(torch.tensor([[0.0, 0.0], [float(width), float(height)]]), frame)
            assert (corners >= -1).all()
            assert (corners <= VIEW_PX + 1).all()
    how = features.Extraction(VIEW_PX, 1.0, 1, 10**6, torch.float32)
    whole = functools.partial(views, "mask", False)
    again = features.batches(
        dataset, np.arange(NUM), whole, how, Context(tmp_path), Quarantine(), batch_size=3, target="mask"
    )
    assert torch.equal(torch.cat([batch["image"] for batch in again]), load(dataset, "mask", False)[0]["image"])
