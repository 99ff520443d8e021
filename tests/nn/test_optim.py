from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distssl.errors import ConfigError
from distssl.nn import optim


def net() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_lars_adapts_weights_by_its_closed_form_and_leaves_biases_and_norms_to_sgd(weight_decay):
    module = net()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optim.build(module, name="lars", lr=0.5, weight_decay=weight_decay, momentum=0.9, trust_coefficient=0.01).step()
    for name, parameter in module.named_parameters():
        w, g = before[name], parameter.grad
        assert g is not None
        if w.ndim > 1:
            trust = 0.01 * w.norm() / (g.norm() + weight_decay * w.norm())
            g = trust * (g + weight_decay * w)
        torch.testing.assert_close(parameter.detach(), w - 0.5 * g)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_weight_decay_touches_weights_only(name):
    module = net()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optim.build(module, name=name, lr=0.1, weight_decay=0.1).step()
    for key, parameter in module.named_parameters():
        if parameter.ndim <= 1:
            assert torch.equal(parameter, before[key])
        elif name != "lars":  # timm's trust ratio is 1 where the gradient is 0
            torch.testing.assert_close(parameter.detach(), before[key] * 0.99)


def test_frozen_parameters_are_left_out_and_unknown_names_refused():
    module = net()
    module[0].requires_grad_(False)
    optimizer = optim.build(module, name="adamw", lr=0.1, weight_decay=0.1, momentum=0.8)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.999)
    with pytest.raises(ConfigError, match="optimizer=adam is unknown: use sgd, adamw or lars"):
        optim.build(module, name="adam", lr=0.1, weight_decay=0.0)


def test_the_learning_rate_warms_up_linearly_then_follows_half_a_cosine():
    rates = [optim.learning_rate(s, base=2.0, total_steps=110, warmup_steps=10, final=0.2) for s in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert rates[10:] == pytest.approx([0.2 + 0.9 * (1 + math.cos(math.pi * s / 100)) for s in range(101)])
    assert rates[60] == pytest.approx(1.1)
    assert rates[110] == pytest.approx(0.2)


def test_the_learning_rate_has_no_holes_at_its_ends():
    assert optim.learning_rate(0, base=1.0, total_steps=10, warmup_steps=0) == 1.0
    assert optim.learning_rate(9, base=1.0, total_steps=10, warmup_steps=10) == 1.0
    assert optim.learning_rate(50, base=1.0, total_steps=10, warmup_steps=2, final=0.1) == pytest.approx(0.1)


def test_set_learning_rate_sets_every_group():
    optimizer = optim.build(net(), name="sgd", lr=0.1, weight_decay=0.1)
    optim.set_learning_rate(optimizer, 0.03)
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.03]


def test_a_parameter_may_have_a_rate_of_its_own_or_a_constant_one():
    module = net()
    names = [name for name, _ in module.named_parameters()]

    def rate(name: str, parameter: torch.nn.Parameter) -> optim.Rate:
        return optim.Rate(scale=0.5, constant=name == names[0])

    optimizer = optim.build(module, rate=rate, name="sgd", lr=0.1, weight_decay=0.1)
    optim.set_learning_rate(optimizer, 0.02)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.05 if name == names[0] else 0.01)
