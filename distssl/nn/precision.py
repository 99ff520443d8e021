"""Which number formats a run computes in, decided by what the machine does well and right."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from distssl import collectives
from distssl.errors import ConfigError

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# float64 is for proofs: it tells a wrong gradient from one that is only rounded.
_DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def resolve(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype to compute in: bfloat16 means autocast over float32 parameters, float64 parameters of that type.

    "auto" is bfloat16 where `device` computes in it natively (a CPU with AVX-512 BF16 or AMX, a GPU from Ampere on)
    and float32 elsewhere; the other names are taken at their word. Raises ConfigError for a name that is none.
    """
    if name == "auto":
        return torch.bfloat16 if _has_native_bf16(torch.device(device)) else torch.float32
    if name not in _DTYPES:
        raise ConfigError(f"train.precision={name} is unknown: auto, {', '.join(_DTYPES)} are right")
    return _DTYPES[name]


def agreed(name: str, device: torch.device | str) -> torch.dtype:
    """`resolve` for all ranks: float32 where "auto" is not the same on all of them. Every rank calls it."""
    dtypes = set(collectives.gather_objects(resolve(name, device)))
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def kept(began: str | None, name: str, device: torch.device | str) -> torch.dtype:
    """What a run goes on in: as it began, by `name_of`, whatever "auto" is on this machine. Every rank calls it.

    began: None for a run that begins here, which takes what is `agreed`.
    """
    here = agreed(name, device)
    if began in (None, name_of(here)):
        return here
    if collectives.rank() == 0:
        log.warning("computing in %s, as this run began; here train.precision=%s is %s", began, name, name_of(here))
    return resolve(began, device)


def name_of(dtype: torch.dtype) -> str:
    """Of a dtype that `resolve` gives: the name that is taken at its word."""
    return next(name for name, known in _DTYPES.items() if known == dtype)


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Compute in bfloat16 inside the block where that is the dtype; otherwise change nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Compute outside autocast, with tensors in float32 at least: sums of exponentials and distances need it."""

    @functools.wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*map(_widened, args), **{name: _widened(arg) for name, arg in kwargs.items()})  # pyright: ignore[reportCallIssue]

    return computed


def _widened(value: object) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.promote_types(value.dtype, torch.float32))
    return value


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """What parameters and views are held in when computing in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def speed_up_float32_matmul(device: torch.device | str = "cpu") -> str:
    """Set torch's float32 matmul precision to "medium" if that costs no accuracy; returns what is set.

    On a CPU "medium" sends float32 products to oneDNN: with AVX-512 alone 2.2 times MKL's speed and as exact, but with
    AMX in bf16, with an error of 2e-3; a GPU rounds to TF32. The setting is one for all devices, so a product is tried
    on the CPU and on `device`, and unless both are within 1e-5 of float64's it goes back to "highest".
    """
    torch.set_float32_matmul_precision("medium")
    if any(_product_error(tried) > 1e-5 for tried in {torch.device("cpu"), torch.device(device)}):
        torch.set_float32_matmul_precision("highest")
    return torch.get_float32_matmul_precision()


def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()  # the names differ by architecture
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def _product_error(device: torch.device) -> float:
    """The relative error of a float32 product large enough (256 x 256) for the fast kernels to take it."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator).to(device)
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())
