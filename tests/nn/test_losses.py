from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import collectives
from distssl.nn import losses
from tests import peers
from tests.views import error, problem

IMAGES, INPUTS, OUTPUTS = 32, 12, 16


def reference(za: Tensor, zb: Tensor, temperature: float) -> Tensor:
    """SimCLR's eq. 1 term by term: -log(e^p / sum of e^s over others) = log(1 + sum over negatives of e^(s - p))."""
    z = F.normalize(torch.cat([za, zb]), dim=1)
    similarity = z @ z.T / temperature
    n = len(za)
    total = z.new_zeros(())
    for i in range(2 * n):
        positive = similarity[i, (i + n) % (2 * n)]
        negatives = [j for j in range(2 * n) if j not in (i, (i + n) % (2 * n))]
        total = total + torch.log1p(torch.exp(similarity[i, negatives] - positive).sum())
    return total / (2 * n)


def of_one_process(temperature: float) -> tuple[Tensor, Tensor]:
    xa, xb, encoder = problem(IMAGES, INPUTS, OUTPUTS, 1 / 2)
    encoder.requires_grad_()
    loss = reference(xa @ encoder, xb @ encoder, temperature)
    loss.backward()
    assert encoder.grad is not None
    return loss.detach(), encoder.grad


def of_this_rank(dtype: torch.dtype, temperature: float, planted: bool = False) -> tuple[Tensor, Tensor]:
    """Loss and gradient after DDP's mean over ranks; `planted`: as negatives of other ranks z_i get no gradient."""
    with pytest.MonkeyPatch.context() as patch:
        if planted:
            gathered = collectives.gather_no_grad  # of embeddings; and of numbers: how much other ranks' sums weigh
            patch.setattr(collectives, "gather_no_grad", lambda x: gathered(x) if x.ndim > 1 else 0 * gathered(x))
        xa, xb, encoder = (x.to(dtype) for x in problem(IMAGES, INPUTS, OUTPUTS, 1 / 2))
        mine = slice(
            collectives.rank() * IMAGES // collectives.world_size(),
            (collectives.rank() + 1) * IMAGES // collectives.world_size(),
        )
        encoder.requires_grad_()
        loss = losses.nt_xent(xa[mine] @ encoder, xb[mine] @ encoder, temperature)
        loss.backward()
    assert encoder.grad is not None
    size = collectives.world_size()
    return collectives.sum_(loss.detach()) / size, collectives.sum_(encoder.grad) / size


@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_nt_xent_has_one_process_gradient_at_every_world_size(ranks, world_size, dtype, tolerance, temperature):
    if world_size == 1:
        results = [of_this_rank(dtype, temperature)]
    else:
        results = ranks(world_size).run(of_this_rank, dtype, temperature)
    loss, grad = of_one_process(temperature)
    for loss_of_rank, grad_of_rank in results:
        assert error(loss_of_rank, loss) < tolerance
        assert error(grad_of_rank, grad) < tolerance


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_gather_without_gradient_is_caught_by_that_comparison(ranks, world_size):
    loss, grad = of_one_process(0.1)
    for loss_of_rank, grad_of_rank in ranks(world_size).run(of_this_rank, torch.float64, 0.1, True):
        assert error(loss_of_rank, loss) < 1e-12  # the loss does not show it
        assert error(grad_of_rank, grad) > 1e-2


def saturated() -> tuple[Tensor, Tensor]:
    """Views that agree to 1e-3: at temperature 0.02 the positive stands at 50 and the negatives about 25 below."""
    generator = torch.Generator().manual_seed(1)
    za = torch.randn(24, 32, generator=generator)
    return za, za + 1e-3 * torch.randn(24, 32, generator=generator)


def test_nt_xent_keeps_its_gradient_at_temperature_0_02_with_saturated_positives():
    za, zb = saturated()
    exact_a, exact_b = za.double().requires_grad_(), zb.double().requires_grad_()
    reference(exact_a, exact_b, 0.02).backward()
    za, zb = za.requires_grad_(), zb.requires_grad_()
    losses.nt_xent(za, zb, 0.02).backward()
    for z, exact in ((za, exact_a), (zb, exact_b)):
        assert z.grad is not None
        assert exact.grad is not None
        assert 0 < exact.grad.norm() < 1e-3
        assert error(z.grad, exact.grad) < 5e-5


def test_lightlys_gradient_is_not_as_exact_there():
    """The positive's part of it is its share less 1, which is rounded away."""
    exact, rounded = ([z.to(dtype).requires_grad_() for z in saturated()] for dtype in (torch.float64, torch.float32))
    reference(*exact, 0.02).backward()
    peers.lightly("loss").NTXentLoss(0.02)(*rounded).backward()
    assert all(error(z.grad, of.grad) > 5e-4 for z, of in zip(rounded, exact, strict=True))


def test_nt_xent_computes_in_float32_under_autocast_and_of_bf16_embeddings():
    za, zb = saturated()
    plain = losses.nt_xent(za, zb, 0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(losses.nt_xent(za, zb, 0.02), plain)
    rounded = losses.nt_xent(za.bfloat16(), zb.bfloat16(), 0.02)
    assert rounded.dtype == torch.float32
    assert rounded.isfinite()


def test_nt_xent_of_embeddings_all_alike_is_the_log_of_the_number_of_choices():
    z = torch.ones(8, 4, dtype=torch.float64)
    torch.testing.assert_close(losses.nt_xent(z, z, 0.02), torch.tensor(15.0, dtype=torch.float64).log())
