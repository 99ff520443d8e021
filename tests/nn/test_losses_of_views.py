"""Each loss against its equation, term by term, in one process and over ranks, and against lightly where it has one.

It has none for vibcreg and in_batch. Constants that differ are given and said at each.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import collectives
from distssl.nn import losses, moments, sinkhorn
from tests import peers
from tests.views import error, problem

IMAGES, INPUTS, OUTPUTS = 16, 10, 6


def barlow_twins(za: Tensor, zb: Tensor) -> Tensor:
    total = za.new_zeros(())
    a = (za - za.mean(0)) / (za.var(0, unbiased=False) + 1e-5).sqrt()
    b = (zb - zb.mean(0)) / (zb.var(0, unbiased=False) + 1e-5).sqrt()
    for i in range(OUTPUTS):
        for j in range(OUTPUTS):
            c = (a[:, i] * b[:, j]).sum() / len(za)
            total = total + ((1 - c) ** 2 if i == j else 0.0051 * c**2)
    return total


def vicreg(za: Tensor, zb: Tensor) -> Tensor:
    """The published code's: eq. 6 with the variance terms halved."""
    total = 25 * (za - zb).square().mean()
    for z in (za, zb):
        total = total + 25 / 2 * torch.stack([F.relu(1 - (z[:, i].var() + 1e-4).sqrt()) for i in range(OUTPUTS)]).mean()
        cov = z.T.cov()
        total = total + sum(cov[i, j] ** 2 for i in range(OUTPUTS) for j in range(OUTPUTS) if i != j) / OUTPUTS
    return total


def vibcreg(za: Tensor, zb: Tensor) -> Tensor:
    total = 25 * (za - zb).square().mean()
    for z in (za, zb):
        total = total + 25 * torch.stack([F.relu(1 - (z[:, i].var() + 1e-4).sqrt()) for i in range(OUTPUTS)]).mean()
        corr = z.T.corrcoef()
        off = sum(corr[i, j] ** 2 for i in range(OUTPUTS) for j in range(OUTPUTS) if i != j)
        total = total + 200 * off / OUTPUTS**2
    return total


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    return -torch.stack([(a @ b) / (a.norm() * b.norm()) for a, b in zip(p, z, strict=True)]).mean()


def in_batch(queries: Tensor, keys: Tensor) -> Tensor:
    """MoCo v3's algorithm 1, one direction, its keys without gradient."""
    terms = []
    for i, q in enumerate(queries):
        similar = torch.stack([F.cosine_similarity(q, k, dim=0) for k in keys.detach()]) / 0.2
        terms.append(-(similar[i] - similar.logsumexp(0)))
    return torch.stack(terms).mean()


REFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "barlow_twins": barlow_twins,
    "vicreg": vicreg,
    "vibcreg": vibcreg,
    "negative_cosine": negative_cosine,
    "in_batch": in_batch,
}


def ours(name: str, za: Tensor, zb: Tensor) -> Tensor:
    if name == "in_batch":
        return losses.in_batch(za, collectives.gather_no_grad(zb), 0.2)
    return getattr(losses, name)(za, zb)


def of_one_process(name: str) -> tuple[Tensor, Tensor]:
    xa, xb, encoder = problem(IMAGES, INPUTS, OUTPUTS, 1 / 8)
    encoder.requires_grad_()
    loss = REFERENCES[name](xa @ encoder, xb @ encoder)
    loss.backward()
    assert encoder.grad is not None
    return loss.detach(), encoder.grad


def of_this_rank(name: str, planted: str = "") -> tuple[Tensor, Tensor]:
    """Loss and gradient after DDP's mean over ranks; `planted` replaces the differentiable sum, or the whole loss."""
    size = collectives.world_size()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        if planted == "raw all_reduce":
            patch.setattr(collectives, "all_reduce", lambda x: x + (collectives.sum_(x.detach().clone()) - x.detach()))
        elif planted == "local statistics":
            patch.setattr(collectives, "all_reduce", lambda x: x)
        xa, xb, encoder = problem(IMAGES, INPUTS, OUTPUTS, 1 / 8)
        encoder.requires_grad_()
        mine = slice(collectives.rank() * IMAGES // size, (collectives.rank() + 1) * IMAGES // size)
        chosen = functools.partial(ours, name)
        if planted == "lightly":
            chosen = lightlys(gather=True)[name]
            warnings.simplefilter("ignore", FutureWarning)  # of torch, for a collective that lightly uses
        loss = chosen(xa[mine] @ encoder, xb[mine] @ encoder)
        loss.backward()
    assert encoder.grad is not None
    return collectives.sum_(loss.detach()) / size, collectives.sum_(encoder.grad) / size


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_loss_is_its_equation_over_the_global_batch_at_every_world_size(ranks, world_size, name):
    results = [of_this_rank(name)] if world_size == 1 else ranks(world_size).run(of_this_rank, name)
    loss, grad = of_one_process(name)
    for loss_of_rank, grad_of_rank in results:
        assert error(loss_of_rank, loss) < 1e-10
        assert error(grad_of_rank, grad) < 1e-10


@pytest.mark.parametrize("planted", ["raw all_reduce", "local statistics"])
@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "vibcreg"])
def test_a_wrong_collective_is_caught_by_that_comparison(ranks, name, planted):
    _, grad = of_one_process(name)
    for _, grad_of_rank in ranks(2).run(of_this_rank, name, planted):
        assert error(grad_of_rank, grad) > 1e-2


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "vibcreg", "negative_cosine"])
def test_gradients_are_those_of_finite_differences(name):
    za, zb = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(getattr(losses, name), (za, zb))


def lightlys(gather: bool = False) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    loss = peers.lightly("loss")
    return {
        "barlow_twins": loss.BarlowTwinsLoss(lambda_param=0.0051, gather_distributed=gather),
        "vicreg": loss.VICRegLoss(gather_distributed=gather),
        "nt_xent": loss.NTXentLoss(temperature=0.1, gather_distributed=gather),  # its default is 0.5
        "negative_cosine": loss.NegativeCosineSimilarity(),
    }


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "negative_cosine", "nt_xent"])
def test_a_loss_is_lightlys_in_one_process(name):
    generator = torch.Generator().manual_seed(3)
    za = torch.randn(256, 8, generator=generator, dtype=torch.float64)
    zb = za + torch.randn(256, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(getattr(losses, name)(za, zb), lightlys()[name](za, zb), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg", "nt_xent"])
def test_over_ranks_lightlys_losses_are_those_of_one_process_but_for_barlow_twins(ranks, name):
    """It standardises each rank's embeddings by their own mean and deviation before it sums over the ranks."""
    loss, grad = of_this_rank(name, "lightly")
    for loss_of_rank, grad_of_rank in ranks(2).run(of_this_rank, name, "lightly"):
        if name == "barlow_twins":
            assert error(grad_of_rank, grad) > 0.1
        else:
            assert error(loss_of_rank, loss) < 1e-10
            assert error(grad_of_rank, grad) < 1e-10


def test_a_cross_entropy_with_soft_targets_is_timms_of_scores_over_the_temperature():
    from timm.loss import SoftTargetCrossEntropy

    generator = torch.Generator().manual_seed(4)
    scores, targets = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = SoftTargetCrossEntropy()(scores / 0.1, targets.softmax(1))
    torch.testing.assert_close(losses.soft_cross_entropy(scores, targets.softmax(1), 0.1), expected)


def test_info_nce_is_the_cross_entropy_of_finding_the_key_among_the_negatives():
    generator = torch.Generator().manual_seed(1)
    q, k, others = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (5, 5, 12))
    terms = []
    for query, key in zip(q, k, strict=True):
        similar = torch.stack([F.cosine_similarity(query, other, dim=0) for other in (key, *others)]) / 0.07
        terms.append(-similar.log_softmax(0)[0])
    torch.testing.assert_close(losses.info_nce(q, k, others, 0.07), torch.stack(terms).mean())


def assign_slice(epsilon: float) -> Tensor:
    scores = torch.linspace(-1, 1, 16 * 5, dtype=torch.float64).sin().reshape(16, 5)
    rows = 16 // collectives.world_size()
    return sinkhorn.assign(scores[collectives.rank() * rows :][:rows], epsilon, iterations=200)


def test_sinkhorn_shares_prototypes_equally_over_the_global_batch(ranks):
    alone = assign_slice(0.05)
    torch.testing.assert_close(alone.sum(1), torch.ones(16, dtype=torch.float64))
    torch.testing.assert_close(alone.sum(0), torch.full((5,), 16 / 5, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(ranks(2).run(assign_slice, 0.05)), alone, rtol=1e-12, atol=0)


def test_one_iteration_of_sinkhorn_is_swavs():
    """Algorithm 1 of the paper's appendix, on Q of K x B: rows over their sum and K, columns over theirs and B."""
    scores = torch.randn(12, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q = (scores / 0.05).exp().T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / 4
        q = q / q.sum(0, keepdim=True) / 12
    torch.testing.assert_close(sinkhorn.assign(scores, 0.05), (12 * q).T)


def test_moments_are_numpys():
    z = torch.randn(20, 4, dtype=torch.float64)
    torch.testing.assert_close(moments.covariance(z), z.T.cov())
    torch.testing.assert_close(moments.standardise(z, eps=0.0).var(0, unbiased=False), torch.ones(4).double())
