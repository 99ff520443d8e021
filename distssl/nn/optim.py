"""Optimisers, and the learning rate as a pure function of the step: nothing of it needs a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distssl.errors import ConfigError


@dataclass(frozen=True)
class Rate:
    """How a parameter's learning rate differs from the run's."""

    scale: float = 1.0
    constant: bool = False  # the peak learning rate at every step, without warm-up and decay


def build(
    module: nn.Module,
    *,
    rate: Callable[[str, nn.Parameter], Rate] = lambda _name, _parameter: Rate(),
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
) -> torch.optim.Optimizer:
    """An optimiser over the parameters of `module` that require a gradient, grouped by what is done to them.

    Biases and the parameters of norms (one dimension) have no weight decay and, under LARS, no adaptation. `rate`
    gives a parameter, by its name, a learning rate of its own. `name` is "sgd", "adamw" (`momentum` is its beta1) or
    "lars" (You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks,
    https://arxiv.org/abs/1708.03888; `trust_coefficient` is its eta).
    The learning rate multiplies the momentum buffer, as in torch's SGD, so it may change from step to step.
    Raises ConfigError for an unknown name.
    """
    groups = _groups(module, rate, lr, weight_decay)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))
    if name == "lars":
        from timm.optim.lars import Lars  # four seconds that only its users should wait

        return Lars(groups, lr=lr, momentum=momentum, trust_coeff=trust_coefficient)  # pyright: ignore[reportArgumentType]
    raise ConfigError(f"optimizer={name} is unknown: use sgd, adamw or lars")


def learning_rate(step: int, *, base: float, total_steps: int, warmup_steps: int, final: float = 0.0) -> float:
    """The learning rate of optimiser step `step`, counted from 0.

    It rises linearly over `warmup_steps` to `base` (step 0 already moves, the last warm-up step has `base`), then
    follows half a cosine towards `final`, which it would reach at `total_steps`. `base` and `final` are rates.
    Loshchilov and Hutter, SGDR, ICLR 2017, eq. 5, one cycle.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final + (base - final) * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Make `lr` the learning rate of every group, but for what its `Rate` says."""
    for group in optimizer.param_groups:
        if not group["lr_constant"]:
            group["lr"] = lr * group["lr_scale"]


def clip_gradient(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scale all gradients by one factor so that their common L2 norm is at most `max_norm`; the norm before, scalar."""
    parameters = list(parameters)
    if max_norm is not None:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def _groups(
    module: nn.Module, rate: Callable[[str, nn.Parameter], Rate], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups, weights before biases and norms; the same for the same module, in its parameters' order."""
    found: dict[tuple[bool, Rate], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found.setdefault((parameter.ndim > 1, rate(name, parameter)), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * rate.scale,
            "lr_scale": rate.scale,
            "lr_constant": rate.constant,
            "weight_decay": weight_decay if is_weight else 0.0,
            # timm's LARS adapts only groups with weight decay unless told so; adaptation must not hang on the decay.
            "always_adapt": is_weight,
        }
        for (is_weight, rate), parameters in sorted(found.items(), key=lambda item: not item[0][0])
    ]
