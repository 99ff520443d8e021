"""DeepCluster: clusters of the whole dataset before each epoch, the same wherever a run is started or shared out."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import checkpoint, method, monitor, train
from distssl.config import Run
from distssl.context import Context
from distssl.data import balanced_order, shards
from distssl.data.shards import Dataset
from distssl.errors import ConfigError, RunError
from distssl.methods.deepcluster import DeepCluster
from distssl.nn import kmeans
from distssl.nn.per_sample import Embedded
from tests import planted, runs

SETTINGS = ["method.name=deepcluster", "train.precision=float64", "train.epochs=2"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"), num=96)


def build(tmp_path: Path, *settings: str) -> DeepCluster:
    built = method.build(runs.tiny(tmp_path, tmp_path, *SETTINGS, *settings)).double()
    assert isinstance(built, DeepCluster)
    return built


def features(x: Tensor, num_samples: int | None = None) -> Embedded:
    return Embedded(torch.arange(len(x)), x, num_samples or len(x))


def blobs(num: int = 120, dim: int = 24, k: int = 6) -> tuple[Tensor, Tensor]:
    """Rows about k centres far apart, and which."""
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.randn(k, dim, generator=generator, dtype=torch.float64)
    which = torch.arange(num) % k
    return centres[which] + torch.randn(num, dim, generator=generator, dtype=torch.float64), which


def test_pseudo_labels_are_the_clusters_of_whitened_features_of_unit_length(tmp_path: Path) -> None:
    built = build(tmp_path)
    x, which = blobs()
    figures = built.on_epoch_start(0, features(x, 130))
    labels = built.clusters()
    assert labels.shape == (130,)
    assert (labels[120:] == -1).all()
    assert len(set(zip(labels[:120].tolist(), which.tolist(), strict=True))) == 6  # the blobs, by other names
    left, _, _ = np.linalg.svd(x.numpy() - x.numpy().mean(0), full_matrices=False)
    white = F.normalize(torch.from_numpy(left[:, :8]), dim=1)
    centres = torch.stack([white[labels[:120] == k].mean(0) for k in range(6)])
    objective = float((white - centres[labels[:120]]).square().sum())
    assert figures["clusters/objective"] == pytest.approx(objective, rel=1e-6)


def test_the_classifier_starts_anew_with_each_epoch_and_not_alike(tmp_path: Path) -> None:
    built, again = build(tmp_path, "method.clusters=40"), build(tmp_path, "method.clusters=40")
    x, _ = blobs()
    weights = []
    for epoch in range(2):
        built.classifier.bias.data.fill_(3)
        built.on_epoch_start(epoch, features(x))
        weights.append(built.classifier.weight.detach().clone())
        assert (built.classifier.bias == 0).all()
        assert float(weights[-1].std()) == pytest.approx(0.01, rel=0.1)
    assert float((weights[0] * weights[1]).mean() / 0.01**2) == pytest.approx(0, abs=0.1)
    again.on_epoch_start(1, features(x))
    assert torch.equal(again.classifier.weight, weights[1])
    assert torch.equal(again.clusters(), built.clusters())


def test_the_loss_is_the_cross_entropy_of_the_samples_pseudo_labels(tmp_path: Path) -> None:
    built = build(tmp_path)
    built.on_epoch_start(0, features(blobs()[0]))
    ids = torch.tensor([7, 3, 99, 4])
    image = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    found = built({"image": image, "id": ids})
    logits = built.classifier(F.relu(built.projector(built.backbone(image))))
    labels = built.clusters()[ids]
    expected = -torch.stack([logits[n].log_softmax(0)[labels[n]] for n in range(4)]).mean()
    torch.testing.assert_close(found["loss"], expected)


def train_here(run: Run, stop_at: int | None = None) -> tuple[Tensor, Tensor]:
    """Parameters and clusters at the end."""
    with Context(run.run_dir) as context:
        training = train.Training(run, context, Dataset.open(Path(run.data.source)))
        if stop_at is not None:
            context.stop_requested = lambda: training.step == stop_at  # type: ignore[method-assign]
        assert training.run() == (stop_at is None)
        clusters = training.method.clusters()
        assert clusters is not None
        return torch.cat([p.detach().flatten() for p in training.method.parameters()]), clusters


def logged(run: Run, key: str) -> list[float]:
    return [row[key] for row in monitor.read_jsonl(run.run_dir / monitor.METRICS) if key in row]


@pytest.mark.parametrize("name", ["deepcluster", "deepcluster_v2"])
@pytest.mark.parametrize("stop_at", [6, 8])
def test_a_run_killed_at_an_epochs_start_or_in_its_middle_goes_on_the_same_at_another_world_size(
    ranks, packed: Path, tmp_path: Path, name: str, stop_at: int
) -> None:
    whole, broken = (
        runs.tiny(packed, tmp_path, *SETTINGS, f"method.name={name}", f"name={which}") for which in ("whole", "broken")
    )
    expected, clusters = train_here(whole)
    train_here(broken, stop_at)
    for got, same in ranks(2).run(train_here, broken, timeout_s=240):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
        assert torch.equal(same, clusters)
    assert logged(broken, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-9)
    assert len(logged(whole, "loss")) == 12
    ledgers = [monitor.read_jsonl(run.run_dir / monitor.LEDGER) for run in (whole, broken)]
    assert ledgers[0] == ledgers[1]
    for key in ("clusters/nmi_labels", "clusters/nmi_previous", "clusters/largest", "clusters/reassigned"):
        assert logged(broken, key) == pytest.approx(logged(whole, key), rel=1e-9)
        assert len(logged(whole, key)) == (1 if key.endswith(("previous", "reassigned")) else 2)


class Killed(BaseException):
    """Nobody catches it."""


def test_a_run_killed_in_mid_clustering_clusters_again_the_same(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (
        runs.tiny(packed, tmp_path, *SETTINGS, "checkpoint.every=4", f"name={which}") for which in ("whole", "broken")
    )
    expected, clusters = train_here(whole)
    fit, calls = kmeans.fit, []

    def killed(*args, **options) -> kmeans.KMeans:
        calls.append(args)
        if len(calls) == 2:  # the second epoch's, two steps after a checkpoint
            raise Killed
        return fit(*args, **options)

    monkeypatch.setattr(kmeans, "fit", killed)
    with pytest.raises(Killed):
        train_here(broken)
    got, same = train_here(broken)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(same, clusters)
    assert logged(broken, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-9)


def test_an_epoch_draws_what_its_clusters_say(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, *SETTINGS)
    _, clusters = train_here(run)
    drawn = [i for row in monitor.read_jsonl(run.run_dir / monitor.LEDGER) if row["epoch"] == 1 for i in row["ids"]]
    assert sorted(drawn) == balanced_order.choose(clusters.numpy(), seed=run.seed, epoch=1).tolist()
    assert np.ptp(np.bincount(clusters[torch.tensor(drawn)], minlength=6)) <= 6


def test_the_optimiser_forgets_the_old_classifier_alone(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, *SETTINGS)
    with Context(run.run_dir) as context:
        training = train.Training(run, context, Dataset.open(packed))
        batches = training.batches()
        for _ in range(6):
            training.take_step(batches)
        kept = training.optimizer.state[training.method.backbone.net.conv1.weight]["momentum_buffer"].clone()  # type: ignore[union-attr]
        classifier = list(training.method.classifier.parameters())  # type: ignore[union-attr, operator]
        assert all(parameter in training.optimizer.state for parameter in classifier)
        training.start_epoch()
        training.close()
        assert not any(parameter in training.optimizer.state for parameter in classifier)
        found = training.optimizer.state[training.method.backbone.net.conv1.weight]["momentum_buffer"]  # type: ignore[union-attr]
        assert torch.equal(found, kept)


def test_images_that_cannot_be_decoded_have_no_cluster_and_are_not_drawn(tmp_path: Path) -> None:
    packed = shards.pack(str(runs.photos(tmp_path / "images", num=96)), tmp_path / "packed")
    dataset = Dataset.open(packed)
    size = int(dataset.rows(np.array([5])).size[0])
    planted.overwrite(dataset, 5, bytes(size))
    run = runs.tiny(packed, tmp_path, *SETTINGS, "train.epochs=1", "data.max_bad_fraction=0.5")
    _, clusters = train_here(run)
    assert torch.nonzero(clusters == -1).flatten().tolist() == [5]
    rows = monitor.read_jsonl(run.run_dir / monitor.LEDGER)
    assert 5 not in {i for row in rows for i in row["ids"]}
    assert [row["id"] for row in monitor.read_jsonl(run.run_dir / monitor.QUARANTINE)] == [5]


@pytest.mark.parametrize("name", ["deepcluster", "deepcluster_v2"])
def test_constant_features_stop_the_run_by_their_name(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    found = method.find(name)
    embed = found.embed
    monkeypatch.setattr(found, "embed", lambda self, images: 0 * embed(self, images) + 0.25)
    run = runs.tiny(packed, tmp_path, *SETTINGS, f"method.name={name}")
    with pytest.raises(RunError, match=f"{name} cannot cluster .* before epoch 0: .*constant features"):
        train_here(run)


def test_all_in_one_cluster_is_told_by_its_name(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fit = kmeans.fit

    def collapsed(x: Tensor, *args, **options) -> kmeans.KMeans:
        found = fit(x, *args, **options)
        found.labels.fill_(2)
        return found

    monkeypatch.setattr(kmeans, "fit", collapsed)
    run = runs.tiny(packed, tmp_path, *SETTINGS, "train.epochs=1")
    with caplog.at_level(logging.WARNING):
        train_here(run)
    assert "trivial solution: one of 6 clusters holds 100.0 % of the samples" in caplog.text
    assert logged(run, "clusters/trivial") == [1]


def test_more_clusters_than_samples_are_refused(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, *SETTINGS, "method.clusters=97")
    with pytest.raises(ConfigError, match=r"method\.clusters=97 clusters of 96 samples that can be used; at most 96"):
        train_here(run)


def test_assignments_and_centroids_are_in_the_checkpoint_by_sample_id(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, *SETTINGS, "train.epochs=1")
    _, clusters = train_here(run)
    state = checkpoint.newest(run.run_dir)
    assert state is not None
    assert torch.equal(state["model"]["assignments.values"], clusters)
    assert state["model"]["centroids"].shape == (6, 8)
    assert (run.run_dir / monitor.METRICS).exists()
