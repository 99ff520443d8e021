from __future__ import annotations

import logging

import pytest
import torch

from distssl import collectives
from distssl.errors import ConfigError
from distssl.nn import precision


@pytest.fixture
def restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("n", [32, 96, 512])
def test_float32_products_stay_float32_whatever_was_set(restored, n):
    assert precision.speed_up_float32_matmul() in ("medium", "highest")
    a, b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(n))
    exact = a.double() @ b.double()
    assert ((a @ b).double() - exact).norm() / exact.norm() < 1e-5


def test_a_fast_product_that_is_not_exact_puts_highest_back(restored, monkeypatch):
    monkeypatch.setattr(precision, "_product_error", lambda device: 2e-3)
    assert precision.speed_up_float32_matmul() == torch.get_float32_matmul_precision() == "highest"


def test_the_run_s_device_has_a_say_as_well_as_the_cpu(restored, monkeypatch):
    monkeypatch.setattr(precision, "_product_error", lambda device: 2e-3 if device.type == "cuda" else 0.0)
    assert precision.speed_up_float32_matmul("cpu") == "medium"
    assert precision.speed_up_float32_matmul("cuda") == "highest"


@pytest.mark.parametrize(("capabilities", "dtype"), [({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)])
def test_auto_is_bf16_where_the_cpu_computes_in_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision.resolve("auto", "cpu") == dtype


def test_explicit_names_are_taken_at_their_word_and_others_refused():
    assert precision.resolve("bf16", "cpu") == torch.bfloat16
    assert precision.resolve("float32", "cpu") == torch.float32
    with pytest.raises(ConfigError, match=r"train\.precision=fp8 is unknown: auto, bf16, float32, float64 are right"):
        precision.resolve("fp8", "cpu")


def agreed_where_this_rank_has(bf16_ranks: tuple[int, ...]) -> torch.dtype:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "_has_native_bf16", lambda device: collectives.rank() in bf16_ranks)
        return precision.agreed("auto", "cpu")


@pytest.mark.parametrize(
    ("bf16_ranks", "dtype"),
    [((0, 1), torch.bfloat16), ((0,), torch.float32), ((1,), torch.float32), ((), torch.float32)],
)
def test_ranks_compute_in_one_dtype(ranks, bf16_ranks, dtype):
    assert ranks(2).run(agreed_where_this_rank_has, bf16_ranks) == [dtype] * 2


@pytest.mark.parametrize("is_native", [True, False])
def test_a_run_goes_on_as_it_began(monkeypatch, caplog, is_native):
    monkeypatch.setattr(precision, "_has_native_bf16", lambda device: is_native)
    here, other = ("bf16", "float32") if is_native else ("float32", "bf16")
    assert precision.name_of(precision.kept(None, "auto", "cpu")) == here
    assert precision.name_of(precision.kept(here, "auto", "cpu")) == here
    assert not caplog.records
    caplog.set_level(logging.WARNING)
    assert precision.name_of(precision.kept(other, "auto", "cpu")) == other
    assert caplog.messages == [f"computing in {other}, as this run began; here train.precision=auto is {here}"]
