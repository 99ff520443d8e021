from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch
import torch.distributed.distributed_c10d as dist
from torch import Tensor

from distssl import collectives
from distssl.errors import ConfigError


def of_rank(rank: int) -> Tensor:
    return torch.arange(6.0, dtype=torch.float64).reshape(2, 3) + 10 * rank


def weights(rank: int, world_size: int) -> Tensor:
    """What rank `rank` weighs the gathered tensor with: its gradient, different on every rank and row."""
    return torch.sin(torch.arange(6.0 * world_size, dtype=torch.float64).reshape(-1, 3) + rank)


def gather_and_weigh() -> tuple[Tensor, Tensor]:
    x = of_rank(collectives.rank()).requires_grad_()
    y = collectives.gather(x)
    (y * weights(collectives.rank(), collectives.world_size())).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def all_reduce_and_weigh() -> tuple[Tensor, Tensor, bool]:
    x = of_rank(collectives.rank()).requires_grad_()
    y = collectives.all_reduce(x)
    (y * (collectives.rank() + 1)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, torch.equal(x, of_rank(collectives.rank()))


def gather_transposed_bf16() -> bool:
    x = of_rank(collectives.rank()).to(torch.bfloat16).T
    expected = torch.cat([of_rank(rank).to(torch.bfloat16).T for rank in range(collectives.world_size())])
    return torch.equal(collectives.gather(x), expected)


def constants() -> tuple[Tensor, bool, Tensor, list[dict[str, int]], str]:
    rank = collectives.rank()
    x = of_rank(rank).requires_grad_()
    gathered = collectives.gather_no_grad(x)
    ids = collectives.gather_no_grad(torch.tensor([rank], dtype=torch.int64))
    objects = collectives.gather_objects({"rank": rank})
    collectives.barrier()
    text = collectives.broadcast_object(f"from {rank}", source=collectives.world_size() - 1)
    total = collectives.sum_(torch.tensor([1.0, rank, 1e-12], dtype=torch.float64))
    return total, gathered.requires_grad, ids, objects, text


@pytest.mark.parametrize("world_size", [2, 4])
def test_gather_concatenates_in_rank_order_and_its_gradient_is_the_sum_over_ranks(ranks, world_size):
    results = ranks(world_size).run(gather_and_weigh)
    total = sum(weights(rank, world_size) for rank in range(world_size))
    for rank, (value, grad) in enumerate(results):
        assert torch.equal(value, torch.cat([of_rank(r) for r in range(world_size)]))
        torch.testing.assert_close(grad, total[2 * rank : 2 * rank + 2], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_reduce_sums_both_ways_and_leaves_its_argument_alone(ranks, world_size):
    total = sum(of_rank(rank) for rank in range(world_size))
    for value, grad, untouched in ranks(world_size).run(all_reduce_and_weigh):
        torch.testing.assert_close(value, total, rtol=1e-14, atol=0)
        assert torch.equal(grad, torch.full((2, 3), sum(range(1, world_size + 1)), dtype=torch.float64))
        assert untouched


def test_gather_takes_bf16_that_is_not_contiguous(ranks):
    assert ranks(2).run(gather_transposed_bf16) == [True, True]


def passed_on() -> list[Tensor]:
    """Of every other rank, as many rows as its number and one."""
    rank, size = collectives.rank(), collectives.world_size()
    x = of_rank(rank)[:1].repeat(rank + 1, 1).requires_grad_()
    found: list[Tensor] = []
    for step in range(1, size):
        x = collectives.rotate(x, (rank - step) % size + 1)
        found.append(x)
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_rotate_passes_blocks_of_any_length_round_all_ranks(ranks, world_size):
    for rank, found in enumerate(ranks(world_size).run(passed_on)):
        assert len(found) == world_size - 1
        for step, x in enumerate(found, start=1):
            before = (rank - step) % world_size
            assert torch.equal(x, of_rank(before)[:1].repeat(before + 1, 1))
            assert not x.requires_grad


def test_the_collectives_without_gradient_agree_on_every_rank(ranks):
    for total, requires_grad, ids, objects, text in ranks(2).run(constants):
        assert torch.equal(total, torch.tensor([2.0, 1.0, 2e-12], dtype=torch.float64))
        assert not requires_grad
        assert ids.tolist() == [0, 1]
        assert objects == [{"rank": 0}, {"rank": 1}]
        assert text == "from 1"


def test_without_a_process_group_every_collective_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    collectives.init()
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    x = of_rank(0).requires_grad_()
    assert collectives.gather(x) is x
    assert collectives.all_reduce(x) is x
    assert torch.equal(collectives.gather_no_grad(x), x)
    assert not collectives.gather_no_grad(x).requires_grad
    assert torch.equal(collectives.rotate(x), x)
    assert not collectives.rotate(x).requires_grad
    assert collectives.sum_(x) is x
    assert collectives.gather_objects("a") == ["a"]
    assert collectives.broadcast_object("a") == "a"
    collectives.barrier()
    collectives.shutdown()


def test_half_of_torchruns_environment_is_named_as_the_users_mistake(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for variable in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ConfigError, match="RANK, MASTER_ADDR, MASTER_PORT"):
        collectives.init("gloo")


def wait_for_rank_0(within_s: float) -> int:
    return collectives.patiently(lambda: time.sleep(3 * (collectives.rank() == 0)) or collectives.rank(), within_s)


def test_ranks_wait_for_one_as_long_as_the_call_says_and_no_longer(ranks):
    """The pool's own collectives wait for two minutes."""
    assert ranks(2).run(wait_for_rank_0, 60.0) == [0, 1]
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2: Traceback.*[Tt]imed out"):
        ranks(2).run(wait_for_rank_0, 0.5)


def mistake_of_rank_1() -> str:
    def call() -> None:
        if collectives.rank() == 1:
            raise ConfigError("the reason")

    try:
        collectives.patiently(call, 60)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_wait_for_one_have_its_mistake(ranks):
    assert ranks(2).run(mistake_of_rank_1) == ["the reason"] * 2


def test_a_group_of_gpus_takes_tensors_of_the_cpu_too():
    devices = dist.BackendConfig(dist.Backend(collectives.GPU_BACKEND)).get_device_backend_map()
    assert devices == {"cpu": "gloo", "cuda": "nccl"}


def fail_on_rank_1() -> None:
    if collectives.rank() == 1:
        raise KeyError("the reason")
    collectives.barrier()


def never_answer() -> None:
    if collectives.rank() == 1:
        time.sleep(60)


def test_the_pool_raises_a_ranks_error_and_names_a_silent_rank_and_recovers(ranks):
    pool = ranks(2)
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2: Traceback.*fail_on_rank_1.*the reason"):
        pool.run(fail_on_rank_1)
    with pytest.raises(AssertionError, match=r"never_answer: rank \[1\] of 2 is silent"):
        pool.run(never_answer, timeout_s=5)  # the other has to import this module first
    assert pool.run(gather_transposed_bf16) == [True, True]


def fails(how: str) -> None:
    if how == "mistake":
        raise ConfigError("a=1: 2 is right", "b=1: 2 is right")
    if how == "killed" and collectives.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.empty(1 << 50)


@pytest.mark.parametrize(
    ("how", "kind", "told"),
    [
        ("mistake", ConfigError, "a=1: 2 is right\nb=1: 2 is right"),
        ("killed", collectives.NoMemoryError, "the system killed a rank, most likely for its memory"),
        ("too large", collectives.NoMemoryError, "can't allocate memory"),
    ],
)
def test_what_a_rank_cannot_do_is_raised_where_it_was_asked_for(how: str, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=re.escape(told)) as caught:
        collectives.attempt(fails, 2, how)
    if how == "mistake":
        assert len(caught.value.messages) == 2  # type: ignore[attr-defined]


def seen_by_a_rank() -> tuple[str | None, int]:
    return os.environ.get("DISTSSL_OF_A_TEST"), collectives.rank()


def test_ranks_have_the_environment_of_their_own_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first", None, "third"):
        if value is None:
            monkeypatch.delenv("DISTSSL_OF_A_TEST")
        else:
            monkeypatch.setenv("DISTSSL_OF_A_TEST", value)
        assert collectives.launch(seen_by_a_rank, 2) == [(value, 0), (value, 1)]
