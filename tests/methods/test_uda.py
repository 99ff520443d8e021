"""UDA: thresholds and counts against their definitions, over ranks too, and where its labels come from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import collectives, job, monitor, plan, train
from distssl.context import Context
from distssl.data import shards
from distssl.data.shards import Dataset
from distssl.downstream import needs
from distssl.errors import ConfigError, RunError
from distssl.methods import uda
from tests import runs


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"), num=96)


@pytest.mark.parametrize(
    ("signal", "halfway"),
    [("linear", 0.55), ("exp", 0.1 + 0.9 * math.exp(-2.5)), ("log", 0.1 + 0.9 * (1 - math.exp(-2.5))), ("none", 1.0)],
)
def test_the_bound_rises_as_the_paper_says(signal: str, halfway: float) -> None:
    cfg = uda.Config(signal=signal)
    assert uda.threshold(cfg, 0.5) == pytest.approx(halfway)
    assert uda.threshold(cfg, 1.0) == pytest.approx(1.0, abs=0.01)
    if signal == "linear":
        assert uda.threshold(cfg, 0.0) == pytest.approx(0.1)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits and labels of 8 labelled, weak and strong logits of 12 unlabelled images; certainty differs by rank."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.1, 4, 8, dtype=torch.float64)[:, None]
    x = scale * torch.randn(8, 5, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.1, 6, 12, dtype=torch.float64)[:, None]
    weak, strong = (scale * torch.randn(12, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, torch.arange(8) % 5, weak, strong


def reference(x: Tensor, labels: Tensor, weak: Tensor, strong: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    kept = [-row.log_softmax(0)[label] for row, label in zip(x, labels, strict=True) if row.softmax(0)[label] <= bound]
    supervised = torch.stack(kept).mean() if kept else x.sum() * 0
    terms = []
    for a, b in zip(weak, strong, strict=True):
        p = (a.detach() / 0.4).softmax(0)
        divergence = (p * (p.log() - b.log_softmax(0))).sum()
        terms.append(divergence if a.softmax(0).max() > 0.8 else 0 * divergence)
    return supervised, torch.stack(terms).mean()


def of_this_rank(bound: float) -> tuple[Tensor, Tensor, float, float]:
    """Gradients of x and strong after DDP's mean, scattered to their places; both counts."""
    size, rank = collectives.world_size(), collectives.rank()
    x, labels, weak, strong = problem()
    x.requires_grad_(), strong.requires_grad_()
    of_x, of_u = (slice(rank * n // size, (rank + 1) * n // size) for n in (8, 12))
    supervised, num_used = uda.annealed_cross_entropy(x[of_x], labels[of_x], bound)
    consistency, share = uda.consistent(weak[of_u], strong[of_u], 0.4, 0.8)
    (supervised + consistency).backward()
    assert x.grad is not None
    assert strong.grad is not None
    mean_share = float(collectives.sum_(share.clone())) / size
    return collectives.sum_(x.grad) / size, collectives.sum_(strong.grad) / size, float(num_used), mean_share


@pytest.mark.parametrize("bound", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_losses_and_mask_counts_are_the_global_batchs(ranks, world_size: int, bound: float) -> None:
    x, labels, weak, strong = problem()
    x.requires_grad_(), strong.requires_grad_()
    sum(reference(x, labels, weak, strong, bound)).backward()
    p = x.detach().softmax(1)[torch.arange(8), labels]
    results = [of_this_rank(bound)] if world_size == 1 else ranks(world_size).run(of_this_rank, bound)
    for grad_x, grad_strong, num_used, share in results:
        torch.testing.assert_close(grad_x, x.grad)
        torch.testing.assert_close(grad_strong, strong.grad)
        assert num_used == int((p <= bound).sum())
        assert share == pytest.approx(float((weak.softmax(1).amax(1) > 0.8).double().mean()))


def test_the_target_has_no_gradient_and_a_bound_below_all_leaves_no_label() -> None:
    x, labels, weak, strong = (t.requires_grad_() if t.is_floating_point() else t for t in problem())
    consistency, _ = uda.consistent(weak, strong, 0.4, 0.0)
    consistency.backward()
    assert weak.grad is None
    loss, num_used = uda.annealed_cross_entropy(x, labels, 0.0)
    assert (float(loss.detach()), float(num_used)) == (0.0, 0.0)
    assert F.cross_entropy(x, labels) > 0


def test_labelled_images_come_beside_the_others_in_an_order_of_their_own(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, "method.name=uda", "data.num_labelled=24", "train.epochs=1")
    dataset = Dataset.open(packed)
    with Context(run.run_dir) as context:
        training = train.Training(run, context, dataset, labelled=dataset)
        batches = list(training.batches())
        training.close()
    assert len(batches) == 6
    ids = torch.stack([batch["labelled.id"] for batch in batches])  # [6, 8]
    assert sorted(ids[:3].flatten().tolist()) == sorted(ids[3:].flatten().tolist())  # an epoch of three batches
    assert ids[:3].unique().numel() == 24
    for batch in batches:
        assert batch["labelled.label"].tolist() == dataset.rows(batch["labelled.id"].numpy()).label.tolist()


def test_fewer_labels_are_part_of_more(packed: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(packed)

    def ids(num: int) -> set[int]:
        run = runs.tiny(packed, tmp_path, "method.name=uda", f"data.num_labelled={num}")
        return set(plan.of_labelled(run, dataset, 1).ids.tolist())

    assert ids(12) < ids(40)
    assert len(ids(12)) == 12


def test_labels_that_are_held_out_for_the_test_are_not_learnt_from(packed: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(packed)

    def ids(*settings: str) -> set[int]:
        return set(plan.of_labelled(runs.tiny(packed, tmp_path, "method.name=uda", *settings), dataset, 1).ids.tolist())

    every = set(range(96))
    test = set(needs.labelled(runs.tiny(packed, tmp_path), dataset, None, "label").test_ids.tolist())
    assert 0 < len(test) < 40
    assert ids() == ids(f"data.labelled={packed}") == ids(f"eval.source={packed}") == every - test
    assert ids("eval.test_source=elsewhere") == ids("eval.source=elsewhere") == ids("data.labelled=elsewhere") == every
    assert ids("data.labelled=elsewhere", "eval.source=elsewhere") == every - test


def test_the_same_labels_under_two_names_are_refused(packed: Path, tmp_path: Path) -> None:
    named = ["method.name=uda", "method.num_classes=4", f"data.labelled={packed}/*.tar"]
    with pytest.raises(ConfigError, match=r"eval\.source.*\*\.tar under another name"):
        job.prepare(runs.tiny(packed, tmp_path, *named, f"eval.source={packed}/."), 1)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("data.num_labelled=97", r"data.num_labelled=97 is more than the \d\d labels of data.source \(a fifth is held"),
        ("data.num_labelled=4", "data.labelled_batch=8 is more than the 4 labels"),
    ],
)
def test_too_few_labels_are_told(packed: Path, tmp_path: Path, setting: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        plan.of_labelled(runs.tiny(packed, tmp_path, "method.name=uda", setting), Dataset.open(packed), 1)


def test_labels_for_a_method_that_learns_from_none_are_told(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="simclr learns from no labels"):
        job.prepare(runs.tiny(packed, tmp_path, f"data.labelled={packed}", "eval.tasks=[]"), 1)


def test_micro_batches_are_refused_for_two_streams(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, "method.name=uda", "method.num_classes=4", "data.lanes=4", "train.micro_batch=8")
    with pytest.raises(ConfigError, match="uda mixes two streams"):
        job.prepare(run, 1)
    assert not run.run_dir.exists()


def test_uda_runs_as_a_job_on_labels_of_their_own(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, "method.name=uda", f"data.labelled={packed}", "train.epochs=1", "eval.tasks=[]")
    with Context(run.run_dir) as context:
        assert job.pretrain(run, context, job.prepare(run, 1))


def with_bad_images(folder: Path, ids: list[int]) -> Path:
    """Packed photos of which some have been written over since."""
    packed = runs.packed(folder, num=64, seed=1)
    dataset = Dataset.open(packed)
    rows = dataset.rows(np.array(ids))
    for shard, offset in zip(rows.shard, rows.offset, strict=True):
        with open(dataset.shard_paths[shard], "r+b") as file:
            file.seek(offset)
            file.write(b"no image at all")
    return packed


def test_bad_images_among_the_labelled_ones_are_recorded_and_counted(packed: Path, tmp_path: Path) -> None:
    labelled = with_bad_images(tmp_path, [3, 40])
    settings = ["method.name=uda", f"data.labelled={labelled}", "train.epochs=2", "eval.tasks=[]"]
    run = runs.tiny(packed, tmp_path, *settings)
    for stop_at in (3, None):  # and a start that goes on knows them
        with Context(run.run_dir) as context:
            job.prepare(run, 1)
            training = train.Training(run, context, Dataset.open(packed), labelled=Dataset.open(labelled))
            context.stop_requested = lambda stop_at=stop_at, of=training: of.step == stop_at  # type: ignore[method-assign]
            assert training.run() == (stop_at is None)
    found = monitor.read_jsonl(run.run_dir / monitor.QUARANTINE)
    assert sorted((entry["source"], entry["id"]) for entry in found) == [("data.labelled", 3), ("data.labelled", 40)]
    assert monitor.read_jsonl(run.run_dir / monitor.METRICS)[-1]["num_bad"] == 2
    strict = runs.tiny(packed, tmp_path, "name=strict", "data.max_bad_fraction=0.02", *settings)
    with Context(strict.run_dir) as context:
        folders = job.prepare(strict, 1)
        with pytest.raises(RunError, match=r"2 of the \d+ samples of data\.labelled seen are bad"):
            job.pretrain(strict, context, folders)


def test_images_without_labels_are_never_asked_for_theirs(tmp_path: Path) -> None:
    folder = runs.photos(tmp_path / "images", num=32)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(folder.rglob("*.*g"))):
        path.rename(flat / f"{i}{path.suffix}")
    packed = shards.pack(str(flat), tmp_path / "packed")
    assert np.array_equal(Dataset.open(packed).ids_with("label"), [])
    with pytest.raises(ConfigError, match="more than the 0 labels"):
        plan.of_labelled(runs.tiny(packed, tmp_path, "method.name=uda"), Dataset.open(packed), 1)
