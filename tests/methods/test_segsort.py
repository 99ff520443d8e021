"""SegSort: the loss place by place from its equation, classes from masks, superpixels along edges, one memory."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from distssl import method, train
from distssl.context import Context
from distssl.data import shards
from distssl.data.shards import Dataset
from distssl.methods import segsort
from tests import runs


def reference(v: Tensor, own: Tensor, mu: Tensor, kinds: Tensor, kappa: float) -> Tensor:
    """Term by term, in the words of the paper: same-class segments but one's own, own if alone, and all others."""
    total = v.new_zeros(())
    for i, s in enumerate(own.tolist()):
        if s < 0:
            continue
        alike = [t for t in range(len(mu)) if kinds[t] == kinds[s] and t != s] or [s]
        others = [t for t in range(len(mu)) if kinds[t] not in (kinds[s], segsort.NONE)]
        e = {t: torch.exp(kappa * v[i] @ mu[t]) for t in [*alike, *others]}
        near = torch.stack([e[t] for t in alike]).sum()
        total = total - torch.log(near / (near + sum(e[t] for t in others)))
    return total


def test_the_loss_is_the_papers_place_by_place() -> None:
    generator = torch.Generator().manual_seed(0)
    v = F.normalize(torch.randn(12, 4, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
    mu = F.normalize(torch.randn(7, 4, generator=generator, dtype=torch.float64), dim=1).requires_grad_()
    kinds = torch.tensor([0, 1, 0, 2, segsort.NONE, 1, segsort.STRANGER])
    own = torch.tensor([0, 0, 1, 2, 3, 3, -1, 5, 5, 2, 1, 0])
    total, count = segsort.neighbourhood_loss(v, own, mu, kinds, 10.0)
    expected = reference(v, own, mu, kinds, 10.0)
    torch.testing.assert_close(total, expected)
    assert float(count) == 11
    for a, b in zip(torch.autograd.grad(total, (v, mu)), torch.autograd.grad(expected, (v, mu)), strict=True):
        torch.testing.assert_close(a, b)


def squares(folder: Path, num: int = 32) -> Path:
    """Images of two halves of one colour each, and their masks: classes 0 and 1, a stripe of none between."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(num):
        size = int(rng.integers(36, 60))
        edge = int(rng.integers(size // 3, 2 * size // 3))
        colours = rng.uniform(40, 220, (2, 3))
        upper = (np.arange(size) < edge)[:, None, None]
        pixels = np.where(upper, colours[0], colours[1]) + rng.normal(0, 4, (size, size, 3))
        mask = np.where(upper[..., 0], 0, 1) * np.ones((size, size), int)
        mask[edge - 1 : edge + 1] = 255
        for name, array in ((f"{i:02d}.png", pixels.clip(0, 255)), (f"{i:02d}.mask.png", mask)):
            file = io.BytesIO()
            Image.fromarray(array.astype(np.uint8)).save(file, "PNG")
            (folder / name).write_bytes(file.getvalue())
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("squares")
    return shards.pack(str(squares(folder / "images")), folder / "packed")


SUPERVISED = ["method.name=segsort", "method.segments=supervised", "train.precision=float64"]


def views_of(packed: Path, tmp_path: Path, *settings: str) -> tuple[segsort.SegSort, dict[str, Tensor]]:
    run = runs.tiny(packed, tmp_path, *settings)
    with Context(run.run_dir) as context:
        training = train.Training(run, context, Dataset.open(packed))
        views = next(training.batches())
        training.close()
    assert isinstance(training.method, segsort.SegSort)
    return training.method, {k: x.double() if x.is_floating_point() else x for k, x in views.items()}


def test_masks_move_with_their_images(packed: Path, tmp_path: Path) -> None:
    assert Dataset.open(packed).num_annotated == {"mask": 32, "depth": 0, "boxes": 0, "keypoints": 0}
    _, views = views_of(packed, tmp_path, *SUPERVISED)
    image, mask = views["image"], views["mask"]
    assert mask.shape == (16, 1, 32, 32)
    assert mask.dtype == torch.uint8
    assert set(mask.unique().tolist()) == {0, 1, 255}
    for pixels, classes in zip(image, mask[:, 0], strict=True):  # each class has one colour, but for the blurred edge
        for kind in (0, 1):
            of_kind = pixels[:, classes == kind]
            if of_kind.shape[1] > 64:
                assert of_kind.median(1).values.sub(of_kind.mean(1)).abs().max() < 0.15


def test_supervised_segments_keep_to_their_class_and_leave_out_places_of_none(packed: Path, tmp_path: Path) -> None:
    built, views = views_of(packed, tmp_path, *SUPERVISED)
    v = built.train().embed(views["image"])
    found, kind = built._clusters(v.detach(), views["mask"])
    label = views["mask"][:, 0, 2::4, 2::4].flatten(1).long()
    assert ((found == -1) >= (label == 255)).all()
    for segment, of_segment, labels in zip(found, kind, label, strict=True):
        for s in segment[segment >= 0].unique().tolist():
            assert set(labels[segment == s].tolist()) == {int(of_segment[s])}
    assert {0, 1} <= set(kind.unique().tolist()) <= {segsort.NONE, 0, 1}


def test_superpixels_do_not_cross_a_strong_edge(packed: Path, tmp_path: Path) -> None:
    built, views = views_of(packed, tmp_path, "method.name=segsort", "train.precision=float64")
    found, kind = built._superpixels(views["image"])
    assert kind[kind >= 0].unique().numel() == (kind >= 0).sum()  # each a class of its own
    supervised, with_masks = views_of(packed, tmp_path, *SUPERVISED, "name=masks")
    del supervised
    label = with_masks["mask"][:, 0, 2::4, 2::4].flatten(1).long()
    assert torch.equal(with_masks["id"], views["id"])
    crossing = total = 0
    for segment, labels in zip(found, label, strict=True):
        for s in segment[segment >= 0].unique().tolist():
            inside = labels[(segment == s) & (labels != 255)]
            crossing += int(min((inside == 0).sum(), (inside == 1).sum()))
            total += len(inside)
    assert crossing < 0.05 * total


def record(packed: Path, storage: Path, world: str) -> list[Tensor]:
    run = runs.tiny(packed, storage, f"name={world}", *SUPERVISED, "train.epochs=2")
    with Context(run.run_dir) as context:
        training = train.Training(run, context, Dataset.open(packed))
        assert training.run()
    return [value.detach() for value in training.method.state_dict().values()]


def test_supervised_training_is_the_same_over_ranks_though_they_hold_different_numbers_of_places(
    ranks, packed: Path, tmp_path: Path
) -> None:
    alone = record(packed, tmp_path, "alone")
    for found in ranks(2).run(record, packed, tmp_path, "ranks"):
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_the_memory_holds_the_latest_prototypes_with_their_classes(packed: Path, tmp_path: Path) -> None:
    state = record(packed, tmp_path, "alone")
    run = runs.tiny(packed, tmp_path, *SUPERVISED)
    names = list(method.build(run).state_dict())
    rows = state[names.index("memory.rows")]
    kinds = rows[:, -1]
    assert {0, 1} <= set(kinds.unique().tolist()) <= {segsort.NONE, 0, 1}
    torch.testing.assert_close(rows[kinds >= 0, :-1].norm(dim=1), torch.ones(int((kinds >= 0).sum())).double())
