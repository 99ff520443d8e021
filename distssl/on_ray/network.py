"""Process groups on the network that Ray uses.

gloo and NCCL take the interface that the host's own name leads to, which is often the loopback: ranks of two hosts then
never meet, and the error is not one that is tried again. Here both are bound to the interface that owns the address of
the Ray node, before the process group starts.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from distssl import collectives

SIOCGIFADDR = 0x8915  # Linux: the address of an interface
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def layout(num_workers: int, share: dict[str, int]) -> dict[str, Any]:
    """A TorchTrainer's arguments for so many workers, each of which takes a share: {"CPU": ..., "GPU": 0 or 1}."""
    return {
        "scaling_config": ScalingConfig(num_workers=num_workers, use_gpu=share["GPU"] > 0, resources_per_worker=share),
        "torch_config": BoundTorchConfig(backend=collectives.GPU_BACKEND if share["GPU"] else "gloo"),
    }


@dataclass
class BoundTorchConfig(TorchConfig):
    """A TorchConfig whose process groups use Ray's network, unless the user's environment names another."""

    @property
    def backend_cls(self) -> type:
        return _BoundBackend


class _BoundBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(bind)
        super().on_start(worker_group, backend_config)


def bind() -> None:
    """In a worker: have gloo and NCCL use the interface of this Ray node's address."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        for variable in VARIABLES:
            os.environ.setdefault(variable, name)


def interface_of(address: str) -> str | None:
    """The interface that has an IPv4 address; None where none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name[:15].encode()))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
