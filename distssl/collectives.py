"""Collectives between ranks: the only file that talks to torch.distributed.

Without a process group, and in a group of one, every collective is the identity, so nothing above needs a flag.
A collective is differentiable or its docstring says that it is not. The differentiable ones follow one rule: the
gradient of an output is summed over the ranks that hold a copy of it. With DDP's mean over ranks that makes a loss
that averages over this rank's anchors give the gradient of the whole batch, whatever the world size.

Every rank must call the same collectives in the same order, with tensors of the same shape and dtype.
"""

from __future__ import annotations

import datetime
import logging
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from distssl.errors import ConfigError, RunError, first_line

T = TypeVar("T")

A_WEEK_S = 7 * 24 * 3600.0

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_A_RANK = (
    "RANK",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC_",
    "TORCH_NCCL_",
)  # elastic's
_NO_MEMORY = re.compile("out of memory|can't allocate memory|MemoryAllocation|bad_alloc")  # torch, CUDA, DALI
GPU_BACKEND = "cpu:gloo,cuda:nccl"  # nccl alone refuses CPU tensors, and figures and ids are such on a GPU too


class NoMemoryError(RunError):
    """A rank needed more than its device or machine has."""


def init(backend: str | None = None, timeout_s: float = 1800.0) -> None:
    """Join the process group that torchrun's environment variables describe; without WORLD_SIZE do nothing.

    `backend` is "gloo" or GPU_BACKEND; by default the latter where there is a GPU, which is then the one of LOCAL_RANK.
    A collective that waits longer than `timeout_s` seconds raises. Raises ConfigError where a variable is missing.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    missing = [variable for variable in _VARIABLES if variable not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is set but {', '.join(missing)} is not: start the ranks with torchrun")
    backend = backend or (GPU_BACKEND if torch.cuda.is_available() else "gloo")
    if backend == GPU_BACKEND:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))


def launch(function: Callable[..., T], world_size: int, *args: Any) -> list[T]:
    """Call `function(*args)` in `world_size` new processes of this machine, one gloo group with a thread each.

    Returns the results in rank order. All of it must be picklable. Raises torch's ChildFailedError where a rank fails.
    They are forked from a process that has imported the first function's module, have this one's environment, and call
    once all are in the group.
    """
    return _launch(function.__module__, world_size, function, *args)


def _launch(module: str, world_size: int, function: Callable[..., T], *args: Any) -> list[T]:
    """As `launch`. module: what the ranks have at once, where this is the first launch."""
    from torch.distributed.launcher import api

    config = api.LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id="distssl",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="forkserver",
    )
    multiprocessing.set_forkserver_preload([__name__, module])
    results = api.elastic_launch(config, _in_group)(dict(os.environ), function, args)
    return [results[rank] for rank in range(world_size)]


def attempt(function: Callable[..., T], world_size: int, *args: Any) -> list[T]:
    """As `launch`, for ranks that fail alike or do not wait for each other.

    Raises the ConfigError or RunError that one of them raises, and NoMemoryError where one has no room.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("torch.distributed.elastic", "torch.multiprocessing"):  # what they log is in the error too
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        answers = _launch(function.__module__, world_size, _answer, function, args)
    except ChildFailedError as error:
        if any(failure.exitcode == -signal.SIGKILL for failure in error.failures.values()):
            raise NoMemoryError("the system killed a rank, most likely for its memory") from None
        raise
    for answer in answers:
        if isinstance(answer, (ConfigError, RunError)):
            raise answer
    return cast(list[T], answers)


def _answer(function: Callable[..., T], args: tuple[Any, ...]) -> T | ConfigError | RunError:
    try:
        return function(*args)
    except (ConfigError, RunError) as error:
        return error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            return NoMemoryError(first_line(error))
        raise


def _in_group(environ: dict[str, str], function: Callable[..., T], args: tuple[Any, ...]) -> T:
    of_rank = {name: value for name, value in os.environ.items() if name.startswith(_OF_A_RANK)}
    os.environ.clear()  # which was that of the first launch
    os.environ |= {**environ, **of_rank}
    torch.set_num_threads(1)
    init("gloo")
    try:
        barrier()  # one that has nothing to tell the others would be gone while they still connect with it
        return function(*args)
    finally:
        shutdown()


def pretend(world_size: int) -> None:
    """Become rank 0 of a group whose others do not exist: every collective returns at once, and what it brings is void.

    For measuring what a rank of so many does by itself. DistributedDataParallel does not work in it.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it makes the backend known

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


def shutdown() -> None:
    """Leave the process group; without one do nothing."""
    if _has_group():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if _has_group() else 0


def world_size() -> int:
    return dist.get_world_size() if _has_group() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def gather(x: Tensor) -> Tensor:
    """Concatenate `x` [N, ...] of every rank in rank order: [W*N, ...]. N is the same on every rank.

    Differentiable: the gradient of x is the sum over ranks of the gradients of its slice.
    """
    return cast(Tensor, _Gather.apply(x)) if world_size() > 1 else x


def all_reduce(x: Tensor) -> Tensor:
    """Sum `x` over the ranks into a new tensor. Differentiable: the gradient is summed over the ranks too."""
    return cast(Tensor, _AllReduce.apply(x)) if world_size() > 1 else x


def gather_no_grad(x: Tensor) -> Tensor:
    """As `gather`, for tensors of any dtype, and not differentiable: the result is a constant to autograd."""
    x = x.detach()
    return _gathered(x) if world_size() > 1 else x


def rotate(x: Tensor, rows: int | None = None) -> Tensor:
    """What the rank before this one passed, while `x` [N, ...] goes to the rank after it; the last one's is the first.

    After W - 1 times every rank has seen every other's. Not differentiable. `rows`: the first dimension of what comes,
    where it is not N; it may differ between ranks, the others may not.
    """
    if world_size() == 1:
        return x.detach()
    out = x.new_empty((x.shape[0] if rows is None else rows, *x.shape[1:]))
    after, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    send = dist.P2POp(dist.isend, x.detach().contiguous(), after)
    receive = dist.P2POp(dist.irecv, out, before)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    return out


def sum_(x: Tensor) -> Tensor:
    """Sum `x` over the ranks in place and return it; not differentiable. Metrics come as one float64 vector."""
    if world_size() > 1:
        dist.all_reduce(x.detach())
    return x


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The picklable `value` of every rank, in rank order, on every rank. Not differentiable.

    group: another one of all ranks than the one they are in anyway.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group)
    return values


def broadcast_object(value: T, source: int = 0) -> T:
    """The picklable `value` of rank `source`, on every rank. Not differentiable."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return values[0]


def together(call: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """`call()` on every rank; where one raises a ConfigError or RunError, all of them do, instead of waiting for it.

    group: as of `gather_objects`.
    """
    value: T | None = None
    mistake: ConfigError | RunError | None = None
    try:
        value = call()
    except (ConfigError, RunError) as error:
        mistake = error
    for found in gather_objects(mistake, group):
        if found is not None:
            raise found
    return cast(T, value)


def patiently(call: Callable[[], T], within_s: float = A_WEEK_S) -> T:
    """As `together`, for a call that may take longer than a collective may wait, and that no rank gives up before."""
    if world_size() == 1:
        return call()
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=within_s))  # while all ranks are here
    assert isinstance(group, dist.ProcessGroup)
    try:
        return together(call, group)
    finally:
        dist.destroy_process_group(group)


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gathered(x: Tensor) -> Tensor:
    out = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_single(out, x.contiguous())
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _gathered(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = grad.new_empty((grad.shape[0] // world_size(), *grad.shape[1:]))
        dist.reduce_scatter_single(out, grad.contiguous())
        return out


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return sum_(grad.clone(memory_format=torch.contiguous_format))
