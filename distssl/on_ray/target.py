"""Which cluster a command of the command line is for. Imports no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distssl.errors import ConfigError


@dataclass(frozen=True)
class Target:
    """A cluster by its file or by its address, and what happens around a job there."""

    cluster: Path | None
    address: str | None
    detach: bool = False
    down_when_done: bool = False


def of(cluster: Path | None, address: str | None, detach: bool = False, down_when_done: bool = False) -> Target | None:
    """None where the command runs here. Raises ConfigError for options that do not go together."""
    if cluster and address:
        raise ConfigError("--cluster and --address: one of them is right")
    if down_when_done and not cluster:
        raise ConfigError("--down-when-done: needs --cluster; a cluster that somebody else runs is not ours to end")
    if not cluster and not address:
        if detach:
            raise ConfigError("--detach: needs --cluster or --address")
        return None
    return Target(cluster, address, detach, down_when_done)
