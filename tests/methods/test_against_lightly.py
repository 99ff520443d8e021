"""SwAV, DINO and MoCo v2 for a few steps, against the papers' equations term by term and against lightly's losses.

Constants are the papers' and given to lightly's, whose own differ in two: DINO's teacher ends at temperature 0.04 there
(the code's default), at 0.07 here (ViT-S/16 in the paper); MoCo's temperature is 0.5 there (SimCLR's), v2's 0.2 here.
Losses of two embeddings are compared in tests/nn. lightly has none for the other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distssl import collectives, method
from distssl.methods.dino import DINO
from distssl.methods.moco_v2 import MoCoV2
from distssl.methods.swav import SwAV
from distssl.nn import sinkhorn
from tests import peers, runs

N, STEPS = 16, 5


def build(tmp_path: Path, name: str, *settings: str) -> method.Method:
    return method.build(runs.tiny(tmp_path, tmp_path, f"method.name={name}", *settings)).double().train()


def views_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    large = {name: torch.randn(N, 3, 32, 32, generator=generator, dtype=torch.float64) for name in "ab"}
    small = {f"local{i}": torch.randn(N, 3, 16, 16, generator=generator, dtype=torch.float64) for i in range(2)}
    return large | small


def of_crops(net: Callable[[Tensor], Tensor], views: dict[str, Tensor]) -> list[Tensor]:
    """What a network makes of the two large and the two small crops, [N, D] each; crops of a size go in together."""
    large, small = (torch.cat([views[name] for name in names]) for names in (("a", "b"), ("local0", "local1")))
    return [*net(large).chunk(2), *net(small).chunk(2)]


def cross_entropies(targets: Sequence[Tensor], scores: Sequence[Tensor], temperature: float) -> Tensor:
    """The mean over s, t != s and images of -sum_k target_s^k log softmax(score_t / temperature)^k, term by term."""
    terms = []
    for s, target in enumerate(targets):
        for t, score in enumerate(scores):
            for n in range(N if t != s else 0):
                e = (score[n] / temperature).exp()  # [K]
                terms.append(-(target[n] * (e / e.sum()).log()).sum())
    return torch.stack(terms).mean()


def gradients(built: method.Method, loss: Tensor) -> dict[str, Tensor]:
    chosen = {name: parameter for name, parameter in built.named_parameters() if parameter.requires_grad}
    return dict(zip(chosen, torch.autograd.grad(loss, list(chosen.values()), retain_graph=True), strict=True))


def take_step(built: method.Method, loss: Tensor, *expected: Tensor) -> None:
    """Compare the loss and its gradients with others, then move the parameters."""
    found = gradients(built, loss)
    for other in expected:
        torch.testing.assert_close(loss, other.squeeze(), rtol=1e-11, atol=0)
        for name, gradient in gradients(built, other).items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)
    with torch.no_grad():
        for name, gradient in found.items():
            built.get_parameter(name).sub_(0.1 * gradient)
    built.num_steps += 1
    built.on_step_end(built.num_steps / STEPS)


def scores_of_swav(built: SwAV, views: dict[str, Tensor]) -> list[Tensor]:
    z = of_crops(nn.Sequential(built.backbone, built.projector), views)
    return [F.normalize(x, dim=1) @ built.prototypes.weight.T for x in z]  # [N, K] each


def codes(scores: Tensor, queued: Tensor) -> Tensor:
    """SwAV's algorithm 1: the assignments of N images, shared equally among them and the queued."""
    q = (torch.cat([scores, queued]).detach() / 0.05).exp().T
    for _ in range(3):
        q = q / q.sum(1, keepdim=True)
        q = q / q.sum(0, keepdim=True)
    return q.T[:N]


@pytest.mark.parametrize("queue", [0, 2 * N, 2 * N + 8])
def test_swavs_steps_are_the_papers_and_lightlys(tmp_path: Path, queue: int) -> None:
    built = build(tmp_path, "swav", f"method.queue={queue}", "method.freeze_prototypes_steps=0")
    assert isinstance(built, SwAV)
    lightlys = peers.lightly("loss").SwaVLoss()
    earlier: list[list[Tensor]] = [[], []]  # embeddings of each large crop
    for step in range(STEPS):
        scores = scores_of_swav(built, views_of(step))
        queued = [torch.cat(z)[-queue:] @ built.prototypes.weight.T for z in earlier] if step * N >= queue > 0 else None
        targets = [codes(scores[s], queued[s] if queued else scores[s][:0]) for s in range(2)]
        found = built(views_of(step))
        take_step(
            built,
            found["loss"],
            cross_entropies(targets, scores, 0.1),
            lightlys(scores[:2], scores[2:], queued),
        )
        for z, crop in zip(earlier, found["embeddings"], strict=True):
            z.append(crop)


def test_all_but_swavs_frozen_prototypes_have_lightlys_gradient(tmp_path: Path) -> None:
    built = build(tmp_path, "swav", "method.queue=0")
    assert isinstance(built, SwAV)
    scores = scores_of_swav(built, views_of(0))
    theirs = gradients(built, peers.lightly("loss").SwaVLoss()(scores[:2], scores[2:]))
    ours = gradients(built, built(views_of(0))["loss"])
    assert theirs.pop("prototypes.weight").any()
    assert not ours.pop("prototypes.weight").any()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-12)


def codes_of_rank(gather: bool, num_queued: int) -> tuple[Tensor, Tensor]:
    """Ours and lightly's; there each rank has its part of the queue, here the whole."""
    images, prototypes = (torch.linspace(0, 1, n, dtype=torch.float64) for n in (24, 5))
    scores = 1 - (images[:, None] - prototypes).abs()  # those of each rank are near to some prototypes
    batch, queue = scores[num_queued:], scores[:num_queued]
    mine, part = (x.chunk(collectives.world_size())[collectives.rank()] if len(x) else x for x in (batch, queue))
    theirs = peers.lightly("loss.swav_loss").sinkhorn(torch.cat([mine, part]), gather_distributed=gather)
    return sinkhorn.assign(mine, 0.05, more=queue if num_queued else None), theirs[: len(mine)]


@pytest.mark.parametrize("num_queued", [0, 8])
def test_over_ranks_swavs_codes_are_lightlys_if_that_is_told_to_gather(ranks, num_queued: int) -> None:
    for ours, theirs in ranks(2).run(codes_of_rank, True, num_queued):
        torch.testing.assert_close(ours, theirs)
    # By default it shares prototypes among the images of a rank, so that codes depend on the number of ranks.
    for ours, theirs in ranks(2).run(codes_of_rank, False, num_queued):
        assert (ours - theirs).abs().max() > 0.1


def test_lightlys_codes_overflow_where_ours_do_not() -> None:
    scores = torch.tensor([[1.0, 0.9], [0.8, 1.0]])
    assert peers.lightly("loss.swav_loss").sinkhorn(scores, epsilon=0.01).isnan().any()  # e^100 is no float32
    torch.testing.assert_close(sinkhorn.assign(scores, 0.01).double(), sinkhorn.assign(scores.double(), 0.01))


def outputs_of_dino(built: DINO, views: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The teacher's of the large crops and the student's of all, [N, K] each."""
    large = torch.cat([views["a"], views["b"]])
    return list(built.teacher(large).chunk(2)), of_crops(nn.Sequential(built.backbone, built.head), views)


def test_dinos_steps_and_centre_are_the_papers_and_lightlys(tmp_path: Path) -> None:
    """At a temperature that float32, in which lightly keeps it, has exactly."""
    built = build(tmp_path, "dino", "method.teacher_temperature=0.0625", "method.warmup_epochs=0")
    assert isinstance(built, DINO)
    lightlys = peers.lightly("loss").DINOLoss(built.cfg.outputs, teacher_temp=0.0625).double()
    centre = torch.zeros(built.cfg.outputs, dtype=torch.float64)
    for step in range(STEPS):
        of_teacher, of_student = outputs_of_dino(built, views_of(step))
        targets = [((g - centre) / 0.0625).softmax(1) for g in of_teacher]
        expected = [cross_entropies(targets, of_student, 0.1), lightlys(of_teacher, of_student)]
        take_step(built, built(views_of(step))["loss"], *expected)
        centre = 0.9 * centre + 0.1 * torch.cat(of_teacher).mean(0)
        for other in (centre, lightlys.center[0, 0]):
            torch.testing.assert_close(built.centre, other)


def test_dinos_teacher_warms_up_as_lightlys(tmp_path: Path) -> None:
    built = build(tmp_path, "dino")
    assert isinstance(built, DINO)
    lightlys = peers.lightly("loss").DINOLoss(built.cfg.outputs, teacher_temp=0.07)
    temperatures = []
    for epoch in range(30):
        built.epoch = epoch
        temperatures.append(built.temperature())
    torch.testing.assert_close(torch.tensor(temperatures), lightlys.teacher_temp_schedule)
    built.epoch = 77
    assert built.temperature() == lightlys.teacher_temp == 0.07


def test_lightlys_centre_moves_with_every_batch_of_a_step_and_ours_with_the_step(tmp_path: Path) -> None:
    """Two batches of one step are to do what one of both would; there the second weighs more, and has another loss."""
    built = build(tmp_path, "dino", "method.teacher_temperature=0.0625", "method.warmup_epochs=0")
    assert isinstance(built, DINO)
    lightlys = peers.lightly("loss").DINOLoss(built.cfg.outputs, teacher_temp=0.0625).double()
    means = []
    for batch in range(2):
        of_teacher, of_student = outputs_of_dino(built, views_of(batch))
        means.append(torch.cat(of_teacher).mean(0))
        found, theirs = built(views_of(batch))["loss"], lightlys(of_teacher, of_student)
        assert (abs(found - theirs) < 1e-11) == (batch == 0)
    built.on_step_end(0.5)
    torch.testing.assert_close(built.centre, 0.05 * means[0] + 0.05 * means[1])
    torch.testing.assert_close(lightlys.center[0, 0], 0.09 * means[0] + 0.1 * means[1])


@pytest.mark.parametrize("queue", [3 * N, 3 * N - 8])
def test_mocos_steps_and_queue_are_the_papers_and_lightlys_if_that_holds_whole_batches(
    tmp_path: Path, queue: int
) -> None:
    """Where a batch does not fit in at the end, lightly's queue drops the rest of it and keeps older keys instead."""
    built = build(tmp_path, "moco_v2", f"method.queue={queue}")
    assert isinstance(built, MoCoV2)
    built.queue.rows.copy_(F.normalize(built.queue.rows, dim=1))  # to float64's precision
    lightlys = peers.lightly("loss").NTXentLoss(0.2, memory_bank_size=(queue, built.cfg.projector[-1])).double()
    lightlys.memory_bank.bank.copy_(built.queue.rows)
    keys = built.queue.rows.clone()
    differs = []
    for step in range(STEPS):
        views = views_of(step)
        query = built.projector(built.backbone(views["a"]))
        key = built.teacher(views["b"])
        q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
        similar = torch.cat([(q * k).sum(1, keepdim=True), q @ keys[-queue:].T], dim=1) / 0.2
        theirs = lightlys(query, key)
        found = built(views)["loss"]
        differs.append(bool(abs(found - theirs) > 1e-6))
        take_step(built, found, -similar.log_softmax(1)[:, 0].mean(), *([] if queue % N else [theirs]))
        keys = torch.cat([keys, k])
    assert differs == [bool(queue % N) and step >= 3 for step in range(STEPS)]
    assert torch.equal(built.queue.rows, lightlys.memory_bank.bank) == (queue % N == 0)
