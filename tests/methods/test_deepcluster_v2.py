"""DeepCluster-v2: the memory, its clusters and the loss against the definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import collectives, method
from distssl.errors import ConfigError
from distssl.methods.deepcluster_v2 import DeepClusterV2
from distssl.nn.per_sample import Embedded
from tests import runs

TEMPERATURE = 0.1


def build(tmp_path: Path, *settings: str) -> DeepClusterV2:
    built = method.build(runs.tiny(tmp_path, tmp_path, "method.name=deepcluster_v2", *settings)).double()
    assert isinstance(built, DeepClusterV2)
    return built


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def views_of(n: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    large = {name: torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.float64) for name in "ab"}
    small = {f"local{i}": torch.randn(n, 3, 16, 16, generator=generator, dtype=torch.float64) for i in range(2)}
    return large | small


def started(tmp_path: Path, num_samples: int = 60) -> DeepClusterV2:
    """After clustering, with sample 4 never seen."""
    built = build(tmp_path)
    ids = torch.tensor([i for i in range(num_samples) if i != 4])
    built.on_epoch_start(0, Embedded(ids, unit(len(ids), 16), num_samples))
    return built


def test_clusters_are_of_the_memory_each_head_by_its_own_centroids(tmp_path: Path) -> None:
    built = started(tmp_path)
    memory, labels = built.memory.values, built.assignments.values
    assert (memory[4] == 0).all()
    assert (labels[4] == -1).all()
    here = torch.arange(60) != 4
    for head, centroids in enumerate(built.prototypes.split([6, 5])):
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(len(centroids), dtype=torch.float64))
        assert torch.equal((memory[here] @ centroids.T).argmax(1), labels[here, head])
    assert not any(parameter is built.prototypes for parameter in built.parameters())


def reference(built: DeepClusterV2, views: dict[str, Tensor]) -> Tensor:
    """The definition, term by term, over the images that have clusters."""
    crops = [
        built.embed(torch.cat([views["a"], views["b"]])).chunk(2),
        built.embed(torch.cat([views["local0"], views["local1"]])).chunk(2),
    ]
    terms = []
    for z in [z for pair in crops for z in pair]:
        for head, centroids in enumerate(built.prototypes.split([6, 5])):
            for n, sample in enumerate(views["id"].tolist()):
                label = int(built.assignments.values[sample, head])
                if label >= 0:
                    terms.append(-F.log_softmax(centroids @ z[n] / TEMPERATURE, dim=0)[label])
    return torch.stack(terms).mean()


def test_the_loss_is_the_papers_without_images_that_have_no_cluster(tmp_path: Path) -> None:
    built = started(tmp_path)
    views = views_of(5) | {"id": torch.tensor([9, 4, 0, 33, 59])}
    found = built(views)
    torch.testing.assert_close(found["loss"], reference(built, views), rtol=1e-10, atol=0)
    assert 0 <= found["accuracy"] <= 1


def test_a_batch_without_any_cluster_has_no_gradient_and_no_nan(tmp_path: Path) -> None:
    built = started(tmp_path)
    loss = built(views_of(2) | {"id": torch.tensor([4, 4])})["loss"]
    loss.backward()
    assert loss.detach() == 0
    assert all(float(p.grad.abs().sum()) == 0 for p in built.parameters() if p.grad is not None)


def test_the_memory_holds_the_first_crops_of_a_step_from_its_end_on(tmp_path: Path) -> None:
    built = started(tmp_path)
    before = built.memory.values.clone()
    views = views_of(3) | {"id": torch.tensor([4, 10, 11])}
    with torch.no_grad():
        built(views)
        assert torch.equal(built.memory.values, before)
        built.on_step_end(0.5)
        z = built.embed(torch.cat([views["a"], views["b"]])).chunk(2)[0]
    torch.testing.assert_close(built.memory.values[[4, 10, 11]], z)
    others = torch.tensor([i not in (4, 10, 11) for i in range(60)])
    assert torch.equal(built.memory.values[others], before[others])
    built.on_epoch_start(1)
    assert (built.assignments.values[4] >= 0).all()


def global_loss(tmp_path: Path, ids: list[int]) -> tuple[float, Tensor]:
    """Loss and gradient after DDP's mean; each rank has its share of the six ids."""
    built = started(tmp_path).eval()  # no statistics of the batch: what is compared is the loss
    views = views_of(6) | {"id": torch.tensor(ids)}
    rank, world_size = collectives.rank(), collectives.world_size()
    mine = {name: view.chunk(world_size)[rank] for name, view in views.items()}
    loss = built(mine)["loss"]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in built.parameters() if p.grad is not None])
    mean = collectives.sum_(torch.cat([loss.detach()[None], gradient])) / world_size
    return float(mean[0]), mean[1:]


@pytest.mark.parametrize("ids", [[9, 0, 33, 4, 1, 2], [4, 4, 4, 4, 1, 4]])  # of 4 there is no cluster
def test_ranks_with_unequal_numbers_of_known_images_have_the_batchs_gradient(ranks, tmp_path: Path, ids) -> None:
    loss, gradient = global_loss(tmp_path, ids)
    for of_rank, same in ranks(2).run(global_loss, tmp_path, ids):
        assert of_rank == pytest.approx(loss, rel=1e-10)
        torch.testing.assert_close(same, gradient, rtol=1e-8, atol=1e-11)


def test_more_clusters_than_samples_are_refused(tmp_path: Path) -> None:
    built = build(tmp_path, "method.clusters=[5, 70]")
    with pytest.raises(ConfigError, match=r"method\.clusters=\[5, 70\]: of 60 samples .* at most 60 each"):
        built.on_epoch_start(0, Embedded(torch.arange(60), unit(60, 16), 60))
