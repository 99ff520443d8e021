"""SegSort: the loss place by place from its equation, classes from masks, superpixels along edges, one memory; and on
real images with real masks.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from distssl import method, monitor, train
from distssl.context import Context
from distssl.data import augment, shards
from distssl.data.shards import Dataset
from distssl.errors import ConfigError
from distssl.methods import segsort
from tests import planted, runs
from tests.conftest import Said


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


@pytest.fixture(scope="module")
def nuclei(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Microscopy images and their masks, 1 for a nucleus and 0 for none."""
    archive, folder = planted.real("nuclei_cc0_s192.zip"), tmp_path_factory.mktemp("nuclei")
    if not archive.exists():
        pytest.skip(f"{archive} is not there (set DISTSSL_DATA)")
    with zipfile.ZipFile(archive) as file:
        for name in sorted(name for name in file.namelist() if name.startswith("train/"))[:96]:  # two of an image
            (folder / Path(name).name.replace(".png", ".mask.png")).write_bytes(file.read(name))
    return folder


@pytest.fixture(params=["folder", "tar"])
def indexed(request: pytest.FixtureRequest, nuclei: Path, tmp_path: Path, command: Callable[..., Said]) -> Path:
    """The nuclei as a user packs their folder, or as they lie in a tar of somebody's."""
    if request.param == "folder":
        assert command("pack", nuclei, tmp_path / "packed")[0] == 0
        return tmp_path / "packed"
    assert command("index", in_tar(nuclei, tmp_path / "tars"))[0] == 0
    return tmp_path / "tars"


def in_tar(images: Path, folder: Path) -> Path:
    planted.write_tar(folder / "a.tar", [(path.name, path.read_bytes()) for path in sorted(images.iterdir())])
    return folder


CONFIG = Path(__file__).parents[2] / "configs/pretrain/segsort_resnet50_voc.yaml"
LARGE = [*SUPERVISED, "method.augment={resize_px: 160, size_px: 128}"]


def contrast(image: Tensor, mask: Tensor) -> float:
    """How unlike the nuclei are to what is around them, summed over images [N, 3, H, W]; of masks [N, H, W]."""
    found = 0.0
    for grey, inside in zip(image.mean(1), mask == 1, strict=True):
        if inside.any() and not inside.all():
            found += float(abs(grey[inside].mean() - grey[~inside].mean()) / grey.std())
    return found


def test_masks_of_real_images_lie_where_their_nuclei_are(indexed: Path, tmp_path: Path) -> None:
    assert Dataset.open(indexed).num_annotated["mask"] == 48
    _, views = views_of(indexed, tmp_path, *LARGE)
    image, mask = views["image"], views["mask"][:, 0]
    middle = (slice(None), slice(8, -8), slice(8, -8))
    there = contrast(image[:, :, 8:-8, 8:-8], mask[middle])
    moved = [mask.roll((dy, dx), (1, 2)) for dy, dx in ((-2, 0), (2, 0), (0, -2), (0, 2))]
    for elsewhere in (*moved, mask.flip(1), mask.flip(2), mask.mT, mask.roll(1, 0)):
        assert contrast(image[:, :, 8:-8, 8:-8], elsewhere[middle]) < 0.98 * there


def test_a_mask_that_is_its_own_image_stays_it(nuclei: Path, tmp_path: Path) -> None:
    """In views whose masks are, bit by bit, those of the real images: draws are of a sample's id, not of its pixels."""
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    for path in nuclei.glob("*.mask.png"):
        (drawn / path.name).write_bytes(path.read_bytes())
        classes = np.asarray(Image.open(path))
        (drawn / path.name.replace(".mask", "")).write_bytes(planted.encode(255 * classes, mode="RGB"))
    folders = [in_tar(images, tmp_path / f"{images.name}_tars") for images in (nuclei, drawn)]
    real, views = (views_of(Path(shards.index(str(folder))), tmp_path, *LARGE)[1] for folder in folders)
    assert torch.equal(views["id"], real["id"])
    assert torch.equal(views["mask"], real["mask"])
    shown = views["image"][:, 0] * augment.STD[0] + augment.MEAN[0]  # 0 to 1
    same = (shown > 0.5) == (views["mask"][:, 0] == 1)
    assert same.double().mean() > 0.99
    inner = F.max_pool2d((shown - 0.5).abs().lt(0.4).double(), 3, 1, 1) == 0  # not at an edge, which is interpolated
    assert same[inner].all()


def test_the_loss_of_real_images_with_masks_is_the_papers(indexed: Path, tmp_path: Path) -> None:
    built, views = views_of(indexed, tmp_path, *SUPERVISED)
    views = {name: view[:4] for name, view in views.items()}
    v = built.double().train().embed(views["image"])
    segment, kind = built._segments(views["image"], v.detach(), views)
    own = torch.where(segment >= 0, segment + kind.shape[1] * torch.arange(4)[:, None], -1).flatten()
    v = v.flatten(0, 1)
    mu = torch.stack([v[own == s].sum(0) for s in range(kind.numel())])
    expected = reference(v, own, F.normalize(mu, dim=1), kind.flatten(), 10.0) / (own >= 0).sum()
    assert {0, 1} <= set(kind.unique().tolist()) <= {segsort.NONE, 0, 1}
    torch.testing.assert_close(built(views)["loss"], expected)


@pytest.mark.parametrize("segments", ["supervised", "unsupervised"])
def test_the_command_trains_on_real_images(
    indexed: Path, tmp_path: Path, command: Callable[..., Said], segments: str
) -> None:
    places = [f"data.source={indexed}", f"machine.storage={tmp_path}", f"machine.cache={tmp_path / 'cache'}"]
    chosen = [f"method.segments={segments}", "method.memory=0", "method.augment={resize_px: 96, size_px: 64}"]
    more = ["name=nuclei", "train.epochs=6", "train.optimizer=adamw", "train.lr=0.005", *chosen, *places]
    code, _, err = command("pretrain", "--config", CONFIG, *runs.settings(["method.name=segsort"]), *more)
    assert code == 0, err
    rows = monitor.read_jsonl(tmp_path / "nuclei" / monitor.METRICS)
    first, last = (np.mean([row["loss"] for row in part]) for part in (rows[:3], rows[-3:]))  # an epoch each
    assert last < 0.85 * first, (first, last)
    assert all(row["segments"] > 1 for row in rows)


def test_a_stride_that_leaves_a_rest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stride=8 does not divide augment\.size_px=36; one that does is right"):
        runs.tiny(tmp_path, tmp_path, "method.name=segsort", "method.stride=8", "method.augment.size_px=36")


def test_the_memory_is_not_kept_for_superpixels_that_cannot_be(packed: Path, tmp_path: Path) -> None:
    built = method.build(runs.tiny(packed, tmp_path, "method.name=segsort", "method.most_segments=48"))
    assert isinstance(built, segsort.SegSort)
    built({"image": torch.randn(4, 3, 32, 32)})
    built.on_step_end(0.5)
    assert built.memory.num_put == 4 * 3**2
