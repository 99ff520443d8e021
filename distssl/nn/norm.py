"""Batch normalisation whose statistics are those of the global batch.

Each rank's mean and variance are combined as Chan, Golub and LeVeque combine samples (Algorithms for Computing the
Sample Variance, The American Statistician 1983), so nothing cancels and ranks may hold different numbers of images.
`nn.SyncBatchNorm` does the same on CUDA and refuses CPU tensors; this works on both.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from distssl import collectives
from distssl.nn import precision

aten = torch.ops.aten
M = TypeVar("M", bound=nn.Module)


def convert(module: nn.Module) -> nn.Module:
    """Replace every nn.BatchNorm1d and nn.BatchNorm2d in `module` by one over all ranks; returns the module.

    On CUDA that is nn.SyncBatchNorm, elsewhere GlobalBatchNorm. Parameters, buffers and their names stay. With one
    rank nothing is touched. timm's norms with an activation inside are replaced too; any other subclass raises
    TypeError, for it would quietly keep the statistics of its own rank.
    """
    if collectives.world_size() == 1:
        return module
    native = any(parameter.is_cuda for parameter in module.parameters())
    return _converted(module, nn.SyncBatchNorm if native else GlobalBatchNorm)


def placed(module: M, device: torch.device, dtype: torch.dtype) -> M:
    """The module with global BatchNorm, on the device to compute in `dtype`, in the memory format of the views."""
    module.to(device, precision.parameter_dtype(dtype))
    convert(module)  # which looks where the module is
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class GlobalBatchNorm(_BatchNorm):
    """nn.BatchNorm1d and nn.BatchNorm2d over all ranks: input [N, C, ...] float, N at least 1, not equal everywhere.

    In training the statistics are those of the global batch and differentiable, and every rank ends with the same
    running statistics (unbiased, with the global count). In evaluation, and with one rank, it is nn.BatchNorm, whose
    state_dict it shares. The gradients of weight and bias are this rank's share, as DDP expects them.
    Raises ValueError for an input of fewer than two dimensions.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected an input of shape [N, C, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or collectives.world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        x = _dense(input)
        mean, var, count = _global_statistics(x.detach())
        self._track(mean, var, count)
        return cast(Tensor, _Normalise.apply(x, self.weight, self.bias, mean, var, count, self.eps))

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


class GlobalBatchNormAct(GlobalBatchNorm):
    """timm's BatchNormAct2d over all ranks: the norm, then its modules `drop` and `act`."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, where mean and var are functions of every rank's x.

    With xhat the normalised x, sums over the global batch of M values a channel, the gradient of x is
    weight / sqrt(var + eps) * (dy - sum(dy) / M - xhat * sum(dy * xhat) / M)  (Ioffe and Szegedy, ICML 2015).
    torch's own kernels in their evaluation form do the elementwise work: they know bf16 and channels_last.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return _affine(x, _as(weight, mean), _as(bias, mean), mean, var, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, var, count = ctx.saved_tensors
        dy = grad.contiguous(memory_format=_memory_format(x))
        _, dy_xhat, dy_sum = aten.native_batch_norm_backward(
            dy, x, None, mean, var, None, None, False, ctx.eps, [False, True, True]
        )  # [C] each, of this rank
        total = collectives.sum_(torch.stack([dy_sum, dy_xhat]))  # [2, C]

        dx = None
        if ctx.needs_input_grad[0]:
            scale = (var + ctx.eps).rsqrt() if weight is None else (var + ctx.eps).rsqrt() * weight
            share = total * (-scale / count).to(scale.dtype)
            dx = _affine(x, share[1], share[0], mean, var, ctx.eps)
            _add_scaled_(dx, dy, scale)
        # Of this rank alone: the mean over ranks is DDP's. Autograd casts them to the parameters' dtype.
        dweight = dy_xhat if ctx.needs_input_grad[1] else None
        dbias = dy_sum if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None, None, None


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C] (float32, or float64 for float64) and count (scalar float64) over all ranks."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    zeros = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
    # The running statistics handed in are scratch: their dtype asks for float32 results of bf16 inputs.
    mean, var = aten.batch_norm_update_stats(x, zeros, torch.zeros_like(zeros), 0.0)
    count = x.numel() // x.shape[1]
    mine = torch.cat([mean, var, mean.new_tensor([count])]).double()  # [2C + 1]
    means, variances, counts = collectives.gather_no_grad(mine[None]).split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total  # [C]
    var = ((variances + (means - mean).square()) * counts).sum(0) / total
    return mean.to(dtype), var.to(dtype), total


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]


def _add_scaled_(dx: Tensor, dy: Tensor, scale: Tensor) -> None:
    """dx += dy * scale, scale [C]. In bf16 the scale goes in as a sum of two bf16 numbers: rounded once it would be off
    by up to 0.4 % for a whole channel, and a float32 scale takes torch off its fast path (23 times slower)."""
    scale = scale.view(-1, *[1] * (dx.dim() - 2))
    high = scale.to(dx.dtype)
    dx.addcmul_(dy, high)
    if dx.dtype != scale.dtype:
        dx.addcmul_(dy, (scale - high).to(dx.dtype))


def _as(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(like.dtype)


def _memory_format(x: Tensor) -> torch.memory_format:
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_memory_format(x))


def _converted(module: nn.Module, target: type[_BatchNorm]) -> nn.Module:
    if isinstance(module, _BatchNorm) and not isinstance(module, (nn.SyncBatchNorm, GlobalBatchNorm)):
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            return _replaced(module, target)
        if {name for name, _ in module.named_children()} == {"drop", "act"}:
            return _replaced(module, GlobalBatchNormAct)
        raise TypeError(
            f"{type(module).__name__} cannot be made global over ranks: use nn.BatchNorm1d or nn.BatchNorm2d"
        )
    for name, child in module.named_children():
        setattr(module, name, _converted(child, target))
    return module


def _replaced(old: _BatchNorm, target: type[_BatchNorm]) -> _BatchNorm:
    new = target(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
    new.weight, new.bias = old.weight, old.bias
    new.running_mean, new.running_var = old.running_mean, old.running_var
    new.num_batches_tracked = old.num_batches_tracked
    for name, child in old.named_children():
        new.add_module(name, child)
    new.training = old.training
    return new
