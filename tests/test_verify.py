"""The certificate: it holds for every method there is, and it fails where a collective, a norm or a draw is wrong."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distssl import collectives, method, verify
from distssl.data import draws, shards
from distssl.nn import norm
from distssl.verify import Case, Record

launch = importlib.import_module("launch")
CASES = [Case(name, accumulate) for name in method.names() for accumulate in (1, 2)]

PLAIN = ("model.stem=7x7_s2_pool", "model.options={}", "model.sobel=true")  # a network without a stem to choose


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    return shards.pack(str(verify.images(folder / "images")), folder / "packed")


def check(case: Case, world_size: int, reference: Record, found: Record) -> None:
    verdict = verify.compare(case, world_size, reference, found)
    assert verdict.views_differ == 0
    assert verdict.loss_error < 1e-9  # the certificate's bound is 1e-6
    assert verdict.gradient_error < 1e-8
    assert verdict.state_error < 1e-6, verdict.worst
    assert verdict.holds


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}-{case.accumulate}")
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_method_takes_one_process_steps_at_any_world_size(
    ranks: Any, packed: Path, tmp_path: Path, case: Case, world_size: int
) -> None:
    reference = verify.record(case, packed, tmp_path / "alone")
    for found in ranks(world_size).run(verify_record, case, packed, tmp_path / "ranks"):
        check(case, world_size, reference, found)


@pytest.mark.parametrize(("backbone", "size_px"), [("alexnet", 64), pytest.param("vgg16", 32, marks=pytest.mark.slow)])
def test_deepcluster_takes_them_with_the_networks_of_its_paper_behind_a_sobel_filter(
    ranks: Any, packed: Path, tmp_path: Path, backbone: str, size_px: int
) -> None:
    settings = (*PLAIN, f"model.backbone={backbone}", f"method.augment.size_px={size_px}")
    case = Case("deepcluster", settings=settings)
    reference = verify.record(case, packed, tmp_path / "alone")
    for found in ranks(2).run(verify_record, case, packed, tmp_path / "ranks", timeout_s=500):
        check(case, 2, reference, found)


def verify_record(case: Case, packed: Path, storage: Path, fault: str = "") -> Record:
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            FAULTS[fault](patch)
        return verify.record(case, packed, storage)


def raw_all_reduce(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(collectives, "all_reduce", lambda x: x + (collectives.sum_(x.detach().clone()) - x.detach()))


def gather_without_gradient(patch: pytest.MonkeyPatch) -> None:
    """NT-Xent gathers embeddings, and numbers: how much each weighs in the gradient of other ranks' anchors."""
    gathered = collectives.gather_no_grad
    patch.setattr(collectives, "gather_no_grad", lambda x: gathered(x) if x.ndim > 1 else 0 * gathered(x))


def local_batch_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(norm, "convert", lambda module: module)


def draws_of_the_rank(patch: pytest.MonkeyPatch) -> None:
    hashed = draws.uniforms
    patch.setattr(
        draws, "uniforms", lambda seed, epoch, ids, n: hashed(seed + collectives.rank(), epoch, np.asarray(ids), n)
    )


def a_queue_of_the_ranks_own(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(collectives, "gather_no_grad", lambda x: x.detach().repeat(2, *[1] * (x.ndim - 1)))


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "raw all_reduce": raw_all_reduce,
    "gather without gradient": gather_without_gradient,
    "local BatchNorm": local_batch_norm,
    "draws of the rank": draws_of_the_rank,
    "a queue of the rank's own": a_queue_of_the_ranks_own,
}


@pytest.mark.parametrize(
    ("fault", "name", "shows"),
    [
        ("raw all_reduce", "barlow_twins", "gradient_error"),
        ("raw all_reduce", "vibcreg", "gradient_error"),
        ("gather without gradient", "simclr", "gradient_error"),
        ("local BatchNorm", "rotation", "loss_error"),
        ("local BatchNorm", "byol", "gradient_error"),
        ("draws of the rank", "simsiam", "views_differ"),
        ("a queue of the rank's own", "moco_v2", "state_error"),
    ],
)
def test_a_planted_fault_is_seen(ranks: Any, packed: Path, tmp_path: Path, fault: str, name: str, shows: str) -> None:
    case = Case(name)
    reference = verify.record(case, packed, tmp_path / "alone")
    found = ranks(2).run(verify_record, case, packed, tmp_path / "ranks", fault)[0]
    verdict = verify.compare(case, 2, reference, found)
    assert not verdict.holds
    assert getattr(verdict, shows) > 1e-3


def test_a_number_that_is_none_holds_nothing() -> None:
    whole = Record({}, [1.0], [torch.ones(1)] * 3, [{"a": torch.zeros(1)}])
    assert verify.compare(Case("simclr"), 2, whole, whole).holds
    no_number = torch.tensor([torch.nan])
    for found in (
        dataclasses.replace(whole, losses=[float("nan")]),
        dataclasses.replace(whole, gradients=[torch.ones(1), no_number, no_number]),
        dataclasses.replace(whole, states=[{"a": torch.zeros(1)}, {"a": no_number}]),
    ):
        assert not verify.compare(Case("simclr"), 2, whole, found).holds


def test_what_is_off_on_any_rank_is_seen() -> None:
    alone, other = ({"a": torch.ones(2), "b": value * torch.ones(2)} for value in (1, 2))
    reference = Record({}, [1.0], [torch.ones(1)], [alone])
    for states in ([alone, other], [other, alone]):
        verdict = verify.compare(Case("simclr"), 2, reference, dataclasses.replace(reference, states=states))
        assert (verdict.state_error, verdict.worst) == (1.0, "b")


def test_the_command_prints_a_table_and_fails_with_the_certificate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["verify", "--methods", "simsiam", "--world-sizes", "2"]
    with pytest.raises(SystemExit) as left:
        launch.main(arguments)
    assert left.value.code == 0
    assert "holds" in capsys.readouterr().out
    monkeypatch.setattr(verify, "LIMIT", 0.0)
    assert launch.main(arguments) == 1
    out, err = capsys.readouterr()
    assert "FAILS" in out
    assert "error: a method does not take the same steps" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--methods", "simsim"], "did you mean simsiam?"),
        (["--world-sizes", "0"], "--world-sizes 0: whole numbers of at least 1 are right"),
        (["--world-sizes", "3"], "workers=3 does not divide"),
    ],
)
def test_bad_input_is_told(capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    assert launch.main(["verify", *arguments]) == 2
    assert told in " ".join(capsys.readouterr().err.split())
