"""NT-Xent and sums of exponentials in tiles, against the same with the whole matrix, in float64 and term by term."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distssl import collectives
from distssl.methods import segsort
from distssl.nn import contrastive, losses
from tests.views import error

TAUS = [0.01, 0.02, 0.1, 0.5, 1.0]


def reference(z: Tensor, temperature: float) -> Tensor:
    """Of views [N, V, D] in float64: for every anchor and every other view of its image, log(1 + Z / e^p)."""
    num_images, num_views, _ = z.shape
    z = F.normalize(z.double(), dim=2).flatten(0, 1)
    image = torch.arange(len(z)) // num_views
    similarity = z @ z.T / temperature
    negatives = similarity.masked_fill(image[:, None] == image, -torch.inf).logsumexp(1)
    terms = []
    for i in range(num_images * num_views):
        positives = [p for p in range(len(z)) if image[p] == image[i] and p != i]
        # log(1 + e^x) without the threshold that softplus has: here x may be -150.
        terms += [torch.log1p((negatives[i] - similarity[i, p]).exp()) for p in positives]
    return torch.stack(terms).mean()


def views(num_images: int, num_views: int = 2, dim: int = 16, noise: float = 0.5) -> Tensor:
    """[N, V, D], float32. A drift along the batch makes every slice of it differ."""
    generator = torch.Generator().manual_seed(num_images + num_views)
    x = torch.randn(num_images, 1, dim, generator=generator) + torch.linspace(-1, 1, num_images)[:, None, None]
    return x + noise * torch.randn(num_images, num_views, dim, generator=generator)


def loss_and_gradient(z: Tensor, temperature: float, **options: Any) -> tuple[Tensor, Tensor]:
    z = z.clone().requires_grad_()
    loss = contrastive.nt_xent(z, temperature, **options)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def exact(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    z = z.double().requires_grad_()
    loss = reference(z, temperature)
    return loss.detach(), torch.autograd.grad(loss, z)[0]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contrastive.TILE, "cpu", 10)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", TAUS)
@pytest.mark.parametrize(("num_images", "num_views"), [(1, 2), (2, 2), (5, 2), (23, 2), (7, 3), (11, 4), (3, 12)])
def test_nt_xent_is_its_equation_for_any_views_whatever_the_tiles(num_images, num_views, temperature):
    z = views(num_images, num_views)
    expected, gradient = exact(z, temperature)
    loss, found = loss_and_gradient(z.double(), temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12 * float(gradient.norm()))
    loss, found = loss_and_gradient(z, temperature)
    assert loss.dtype == found.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-40)
    assert found.isfinite().all()
    assert float((found - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-38  # of which float32 has none


@pytest.mark.parametrize("temperature", [0.02, 0.05, 0.1, 0.5])
@pytest.mark.parametrize("noise", [1.0, 0.1, 1e-3])
def test_the_gradient_is_within_1e_5_of_float64_with_saturated_positives_too(noise, temperature):
    z = views(150, dim=64, noise=noise)
    _, gradient = exact(z, temperature)
    assert error(loss_and_gradient(z, temperature)[1], gradient) < 1e-5


@pytest.mark.parametrize("temperature", [0.01, 0.02])
def test_views_that_are_all_opposite_or_all_alike_are_finite(temperature):
    up = torch.eye(1, 8).repeat(3, 1)
    for za, zb in ((up, -up), (up, up), (-up, up.flip(0)), (torch.cat([up[:1], -up[1:]]), -up)):
        z = torch.stack([za, zb], dim=1)
        loss, gradient = loss_and_gradient(z, temperature)
        torch.testing.assert_close(loss.double(), exact(z, temperature)[0], rtol=1e-5, atol=1e-40)
        assert gradient.isfinite().all()


@pytest.mark.usefixtures("small_tiles")
def test_gradients_are_those_of_finite_differences():
    z = views(7, 3, dim=4).double().requires_grad_()
    torch.autograd.gradcheck(lambda z: contrastive.nt_xent(z, 0.3), z)
    x, y = (F.normalize(torch.randn(n, 4, dtype=torch.float64), dim=1).requires_grad_() for n in (13, 24))
    weights = torch.rand(2, 13, 24, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x, y: contrastive.exp_sums(x, y, 0.3), (x, y))
    torch.autograd.gradcheck(lambda x, y: contrastive.exp_sums(x, y, 0.3, lambda i, j: list(weights[:, i, j])), (x, y))


def test_bf16_embeddings_are_computed_with_in_float32():
    z = views(40).bfloat16()
    loss, gradient = loss_and_gradient(z, 0.02)
    expected, of_rounded = exact(z, 0.02)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert error(gradient, of_rounded) < 3e-3  # bf16 has 8 bits


def of_this_rank(
    z: Tensor, sizes: list[int], temperature: float, ring: bool, give_sizes: bool
) -> tuple[Tensor, Tensor]:
    """The loss after DDP's mean over ranks, and W x this rank's part of its gradient."""
    first = sum(sizes[: collectives.rank()])
    mine = z[first : first + sizes[collectives.rank()]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(contrastive.TILE, "cpu", 10)
        options = {"sizes": sizes} if give_sizes else {}
        loss, gradient = loss_and_gradient(mine, temperature, ring=ring, **options)
    return collectives.sum_(loss) / len(sizes), gradient / len(sizes)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("sizes", [[24], [12, 12], [6, 6, 6, 6], [17, 7], [3, 11, 9, 1]])
@pytest.mark.parametrize(("num_views", "dtype", "tolerance"), [(2, torch.float64, 1e-12), (3, torch.float32, 1e-5)])
def test_ranks_have_the_gradient_of_all_anchors_though_they_hold_different_numbers(
    ranks, num_views, dtype, tolerance, sizes, temperature, ring
):
    z = views(24, num_views).to(dtype)
    arguments = (z, sizes, temperature, ring, len(set(sizes)) > 1)
    results = [of_this_rank(*arguments)] if len(sizes) == 1 else ranks(len(sizes)).run(of_this_rank, *arguments)
    expected, gradient = exact(z, temperature)
    assert all(error(loss, expected) < tolerance for loss, _ in results)
    assert error(torch.cat([of_rank for _, of_rank in results]), gradient) < tolerance


def bytes_sent(num_images: int, dim: int) -> tuple[int, int]:
    """By the ring, forwards and backwards."""
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        rotated = collectives.rotate
        patch.setattr(collectives, "rotate", lambda x, rows: sent.append(x.nbytes) or rotated(x, rows))
        patch.setattr(collectives, "gather_no_grad", None)
        z = torch.randn(num_images, 2, dim, requires_grad=True)
        loss = contrastive.nt_xent(z, 0.1, ring=True)
        forwards = sum(sent)
        loss.backward()
    return forwards, sum(sent) - forwards


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_ring_sends_each_embedding_once_each_way_and_a_number_with_it(ranks, world_size):
    passes = (world_size - 1) * 2 * 9 * 4  # of 2N rows, 4 bytes
    assert ranks(world_size).run(bytes_sent, 9, 5) == [(passes * 5, passes * (5 + 1))] * world_size


class Largest(TorchDispatchMode):
    """The most elements that a tensor made inside the block has."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (list, tuple)) else [out]
        self.numel = max([self.numel, *(x.untyped_storage().nbytes() // 4 for x in made if isinstance(x, Tensor))])
        return out


def test_no_tensor_grows_with_the_square_of_the_batch():
    za, zb = (torch.randn(2000, 32, requires_grad=True) for _ in range(2))
    prototypes = F.normalize(torch.randn(900, 32), dim=1).requires_grad_()
    place = F.normalize(torch.randn(4000, 32), dim=1).requires_grad_()
    own, kinds = torch.arange(4000) % 900, torch.arange(900) // 3
    for loss in (
        lambda: losses.nt_xent(za, zb),
        lambda: losses.in_batch(za, zb, 0.1),
        lambda: losses.info_nce(za, zb, prototypes, 0.1),
        lambda: segsort.neighbourhood_loss(place, own, prototypes, kinds, 10.0)[0],
    ):
        with Largest() as largest:
            loss().backward()
        assert largest.numel <= contrastive.TILE["cpu"] ** 2
    with Largest() as largest:
        (za @ zb.T).square().sum().backward()
    assert largest.numel == 2000**2  # it does see what dense losses make


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("temperature", TAUS)
@pytest.mark.parametrize(("n", "m"), [(3, 50), (50, 3), (23, 31), (10, 10), (1, 1), (4, 0), (0, 4)])
def test_exp_sums_are_the_dense_ones(n, m, temperature):
    generator = torch.Generator().manual_seed(n)
    x, y = (F.normalize(torch.randn(k, 6, generator=generator), dim=1).requires_grad_() for k in (n, m))
    kinds = [torch.arange(k) % 4 / 1.0 for k in (n, m)]

    def weights(i: slice, j: slice) -> list[Tensor]:
        return [contrastive.equal(kinds[0][i], kinds[1][j]), contrastive.different(kinds[0][i], kinds[1][j])]

    powers = (x.double() @ y.double().T / temperature).exp()
    same = kinds[0][:, None] == kinds[1]
    expected = torch.stack([(powers * same).sum(1), (powers * ~same).sum(1)])
    found = contrastive.exp_sums(x, y, temperature, weights)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=3e-5, atol=0)
    torch.testing.assert_close(contrastive.exp_sums(x, y, temperature)[0], powers.sum(1), rtol=3e-5, atol=0)
    scale = temperature * (1 + expected.detach())
    gradients = [torch.autograd.grad((sums / scale).sum(), (x, y)) for sums in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def dense_neighbourhood_loss(v: Tensor, own: Tensor, mu: Tensor, kinds: Tensor, kappa: float) -> Tensor:
    """With all masks at once: near are those of one's kind but one's own, or that alone."""
    v, own = v[own >= 0], own[own >= 0]
    mine = own[:, None] == torch.arange(len(mu))
    same = kinds[own][:, None] == kinds
    near = torch.where((same & ~mine).any(1, keepdim=True), same & ~mine, mine)
    e = (kappa * v @ mu.T).exp()
    far = (e * (~same & (kinds != segsort.NONE))).sum(1)
    return torch.log1p(far / (e * near).sum(1)).sum()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("num_kinds", [1, 4, 90])
@pytest.mark.parametrize("num_places", [0, 57])
def test_segsorts_loss_in_tiles_is_the_dense_one(num_places, num_kinds):
    generator = torch.Generator().manual_seed(num_kinds)
    v, mu = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (num_places, 33))
    v, mu = (F.normalize(x, dim=1).requires_grad_() for x in (v, mu))
    kinds = torch.randint(num_kinds, (33,), generator=generator)
    kinds[::5] = segsort.NONE
    kinds[1::7] = segsort.STRANGER
    own = torch.randint(33, (num_places,), generator=generator)
    own[kinds[own] < 0] = -1
    total, count = segsort.neighbourhood_loss(v, own, mu, kinds, 10.0)
    expected = dense_neighbourhood_loss(v, own, mu, kinds, 10.0)
    assert int(count) == int((own >= 0).sum())
    torch.testing.assert_close(total, expected)
    for a, b in zip(torch.autograd.grad(total, (v, mu)), torch.autograd.grad(expected, (v, mu)), strict=True):
        torch.testing.assert_close(a, b)


def test_in_batch_keeps_its_gradient_where_the_own_key_dominates():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(24, 32, generator=generator)
    near = keys + 1e-3 * torch.randn(24, 32, generator=generator)
    queries = [near, near.double()]
    gradients = []
    for q in queries:
        losses.in_batch(q.requires_grad_(), keys.to(q.dtype), 0.02).backward()
        gradients.append(q.grad)
    similarity = F.normalize(queries[1], dim=1) @ F.normalize(keys.double(), dim=1).T / 0.02
    (expected,) = torch.autograd.grad(F.cross_entropy(similarity, torch.arange(24)), queries[1])
    assert 0 < expected.norm() < 1e-3
    assert error(gradients[1], expected) < 1e-6
    assert error(gradients[0], expected) < 5e-5


def test_what_cannot_be_computed_is_named():
    z = views(4)
    with pytest.raises(ValueError, match=r"temperature=0\.001 is too small: 0\.004 or more is right"):
        contrastive.nt_xent(z, 0.001)
    with pytest.raises(ValueError, match="has 1 view"):
        contrastive.nt_xent(z[:, :1], 0.1)
    with pytest.raises(ValueError, match=r"sizes=\[3\]: rank 0 of 1 has 4"):
        contrastive.nt_xent(z, 0.1, sizes=[3])


def test_no_negatives_cost_nothing():
    loss, gradient = loss_and_gradient(views(1), 0.1)
    assert float(loss) == 0
    assert not gradient.any()
    assert math.isfinite(float(loss))
