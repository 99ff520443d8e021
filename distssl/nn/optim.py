"""Optimisers, and the learning rate as a pure function of the step: nothing of it needs a checkpoint."""

from __future__ import annotations

import math

import torch
from torch import nn

from distssl.errors import ConfigError


def build(
    module: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    trust_coefficient: float = 0.001,
) -> torch.optim.Optimizer:
    """An optimiser over the parameters of `module` that require a gradient, in two groups.

    Weights (two dimensions or more) come first; biases and the parameters of norms have no weight decay and, under
    LARS, no adaptation. `name` is "sgd", "adamw" (`momentum` is its beta1) or "lars" (You, Gitman and Ginsburg, Large
    Batch Training of Convolutional Networks, https://arxiv.org/abs/1708.03888; `trust_coefficient` is its eta).
    The learning rate multiplies the momentum buffer, as in torch's SGD, so it may change from step to step.
    Raises ConfigError for an unknown name.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999))
    if name == "lars":
        from timm.optim.lars import Lars  # four seconds that only its users should wait

        # timm adapts only groups with weight decay unless told otherwise; adaptation must not hang on the decay.
        groups[0]["always_adapt"] = True
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
    """Make `lr` the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
