from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from distssl import collectives
from distssl.nn import heads, losses, norm

SPLITS = {2: ([6, 6], [9, 3]), 4: ([3, 3, 3, 3], [1, 5, 2, 4])}
CHANNELS = 5


def batch(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A global batch [12, ...] whose mean drifts along it, and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x += torch.linspace(-3, 3, shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    dy = torch.randn(shape, generator=generator, dtype=torch.float64) + x / 2
    if len(shape) == 4:
        x, dy = (whole.contiguous(memory_format=torch.channels_last) for whole in (x, dy))
    return x.to(dtype), dy.to(dtype)


def fresh(dims: int, dtype: torch.dtype, **options: object) -> nn.Module:
    module = (nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d)(CHANNELS, **options)  # pyright: ignore[reportArgumentType]
    if module.affine:
        nn.init.uniform_(module.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(1))
        nn.init.uniform_(module.bias, -1, 1, generator=torch.Generator().manual_seed(2))
    return module.to(torch.promote_types(dtype, torch.float32))


def run(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Two training steps: the second one's output and gradients, and the state after it."""
    for _ in range(2):
        module.zero_grad()
        leaf = x.detach().clone().requires_grad_()
        y = module(leaf)
        y.backward(dy)
    assert leaf.grad is not None
    grads = {f"d{name}": parameter.grad for name, parameter in module.named_parameters()}
    return {"y": y.detach(), "dx": leaf.grad, **grads, **{f"state {k}": v for k, v in module.state_dict().items()}}


def of_this_rank(shape: tuple[int, ...], dtype: torch.dtype, sizes: list[int], options: dict) -> dict[str, Tensor]:
    x, dy = (whole.split(sizes)[collectives.rank()] for whole in batch(shape, dtype))
    module = norm.convert(fresh(len(shape), dtype, **options))
    assert type(module) is norm.GlobalBatchNorm
    out = run(module, x, dy)
    out["channels_last"] = torch.tensor([out[k].is_contiguous(memory_format=torch.channels_last) for k in ("y", "dx")])
    return out


def check(ranks, shape, dtype, sizes, tolerance, **options) -> None:
    expected = run(fresh(len(shape), dtype, **options), *batch(shape, dtype))
    results = ranks(len(sizes)).run(of_this_rank, shape, dtype, sizes, options)
    for key, value in expected.items():
        if key in ("y", "dx"):
            ours = torch.cat([result[key] for result in results])
        elif key.startswith("d"):
            ours = torch.stack([result[key] for result in results]).sum(0)
        else:
            ours = results[0][key]
            assert all(torch.equal(result[key], ours) for result in results), f"{key} differs between ranks"
        close = tolerance if key in ("y", "dx") else min(tolerance, 1e-4)  # parameters and state are float32 at least
        torch.testing.assert_close(ours, value, rtol=close, atol=close, msg=lambda text, key=key: f"{key}: {text}")
    if len(shape) == 4:
        assert all(result["channels_last"].all() for result in results)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("shape", [(12, CHANNELS), (12, CHANNELS, 4, 3)], ids=["1d", "2d"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)],
    ids=["f64", "f32", "bf16"],
)
def test_it_is_batch_norm_of_the_whole_batch(ranks, world_size, equal, shape, dtype, tolerance):
    check(ranks, shape, dtype, SPLITS[world_size][0 if equal else 1], tolerance)


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"eps": 1e-2, "momentum": 0.5}]
)
def test_every_option_of_batch_norm_is_kept(ranks, options):
    check(ranks, (12, CHANNELS), torch.float64, [9, 3], 1e-12, **options)


def gradient_of_the_statistics() -> bool:
    """In float64 the backward agrees with finite differences: rank 1's input moves, rank 0's output too."""
    module = norm.GlobalBatchNorm(3).double()
    generator = torch.Generator().manual_seed(collectives.rank())
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=generator)
    target = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=generator)

    def loss(leaf: Tensor) -> Tensor:
        return collectives.all_reduce((module(leaf) * target).sum())

    leaf = x.clone().requires_grad_()
    (loss(leaf) / collectives.world_size()).backward()  # all_reduce sums its gradient over the ranks
    assert leaf.grad is not None
    step = torch.zeros_like(x)
    step[1, 2, 0, 1] = 1e-6 * (collectives.rank() == 1)
    slope = (loss(x + step) - loss(x - step)).detach() / 2e-6
    expected = collectives.gather_no_grad(leaf.grad[None])[1, 1, 2, 0, 1]
    return bool((slope - expected).abs() < 1e-7)


def test_the_gradient_reaches_other_ranks_through_the_statistics(ranks):
    assert ranks(2).run(gradient_of_the_statistics) == [True, True]


def far_from_zero(mean: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(collectives.rank())
    module = norm.GlobalBatchNorm(2, momentum=1.0)
    x = mean + torch.randn(4096, 2, generator=generator)
    module(x)
    assert module.running_var is not None
    return module.running_var, x


def test_the_variance_does_not_cancel_far_from_zero(ranks):
    results = ranks(2).run(far_from_zero, 1e4)
    exact = torch.cat([x for _, x in results]).double().var(0)
    for var, _ in results:
        torch.testing.assert_close(var.double(), exact, rtol=1e-3, atol=0)


def evaluate_and_reload() -> bool:
    torch.manual_seed(0)
    plain, ours = nn.BatchNorm2d(3), norm.GlobalBatchNorm(3)
    plain(torch.randn(4, 3, 2, 2))
    ours.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(4, 3, 2, 2) + collectives.rank()
    return torch.equal(ours.eval()(x), plain.eval()(x))


def test_evaluation_and_state_dict_are_those_of_batch_norm(ranks):
    assert ranks(2).run(evaluate_and_reload) == [True, True]


class Odd(nn.BatchNorm2d):
    pass


def test_convert_finds_every_norm_keeps_its_state_and_refuses_one_it_does_not_know(monkeypatch):
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3, eps=1e-2)), nn.BatchNorm2d(3).eval())
    weight, names = net[1][0].weight, list(net.state_dict())
    assert norm.convert(net) is net
    assert [type(net[1][0]), type(net[2])] == [norm.GlobalBatchNorm] * 2
    assert net[1][0].weight is weight
    assert net[1][0].eps == 1e-2
    assert [net[1][0].training, net[2].training] == [True, False]
    assert list(net.state_dict()) == names
    with pytest.raises(TypeError, match="Odd"):
        norm.convert(nn.Sequential(Odd(3)))


def test_timms_norm_keeps_its_activation(monkeypatch):
    import timm.layers

    theirs, x = timm.layers.BatchNormAct2d(3), torch.randn(4, 3, 2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(collectives, "world_size", lambda: 2)
        ours = norm.convert(copy.deepcopy(theirs))
    assert type(ours) is norm.GlobalBatchNormAct
    assert torch.equal(ours(x), theirs(x))
    ours.load_state_dict(theirs.state_dict(), strict=True)


def test_convert_leaves_a_single_process_alone():
    net = nn.Sequential(nn.BatchNorm1d(3))
    assert norm.convert(net) is net
    assert type(net[0]) is nn.BatchNorm1d


class Model(nn.Module):
    """A small SimCLR whose forward is its loss, as DDP wraps it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.net = nn.Sequential(*conv, heads.mlp([8, 16, 8])).double()

    def forward(self, xa: Tensor, xb: Tensor) -> Tensor:
        return losses.nt_xent(self.net(xa), self.net(xb), 0.2)


def gradient_of_the_model() -> dict[str, Tensor]:
    xa, _ = batch((12, 3, 8, 8), torch.float64)
    xb = xa + torch.sin(7 * xa)
    model = norm.convert(Model())
    if (size := collectives.world_size()) > 1:
        model = nn.parallel.DistributedDataParallel(model)
        xa, xb = (x.chunk(size)[collectives.rank()] for x in (xa, xb))
    model(xa, xb).backward()
    state = {k: v for k, v in model.state_dict().items() if "running" in k}
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {k.removeprefix("module."): v for k, v in (state | grads).items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_model_under_ddp_has_one_process_gradient_and_running_statistics(ranks, world_size):
    expected = gradient_of_the_model()
    assert len(expected) == 2 * 2 + 2 * 2 + 4  # two norms, statistics and parameters; three weights, one bias
    for result in ranks(world_size).run(gradient_of_the_model):
        torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-13)


def test_modules_become_global_where_they_are_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """`convert` chooses by the device, so what is placed has to be there already."""
    seen = []
    monkeypatch.setattr(norm, "convert", lambda module: seen.append({p.device.type for p in module.parameters()}))
    placed = norm.placed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.device("meta"), torch.float64)
    assert seen == [{"meta"}]
    assert {parameter.dtype for parameter in placed.parameters()} == {torch.float64}
