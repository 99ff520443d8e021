"""Whether the hosts of a cluster see what a command names, told before a host is started.

A cloud's hosts are new machines: they see URLs, and paths that the cluster file speaks of (a mount, a volume).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distssl import stores
from distssl.errors import ConfigError
from distssl.on_ray.cluster_file import ClusterFile

DATA = ("data.source", "data.labelled", "eval.source", "eval.test_source")  # also by the name of a data set
PLACES = (*DATA, "model.init", "machine.storage")
PATH = re.compile(r"(?:^|[\s\"'=:,])(~?/[^\s\"'=:,;]+)")


def settle(file: ClusterFile | None, tree: dict[str, Any]) -> None:
    """Put the places in a run's config as the hosts are to be told them.

    Raises ConfigError with a line for each that they do not see.
    """
    keys = [key.split(".") for key in PLACES]
    named = {f"{section}.{name}": found for section, name in keys if (found := tree[section][name])}
    for key, place in places(file, named).items():
        section, name = key.split(".")
        tree[section][name] = place


def overridden(overrides: Iterable[str]) -> dict[str, str]:
    """The places that key=value overrides name, by their key."""
    pairs = (text.partition("=") for text in overrides)
    return {key: value for key, _, value in pairs if key in PLACES}


def places(file: ClusterFile | None, named: Mapping[str, str]) -> dict[str, str]:
    """Places by the key that names them, as the hosts are to be told them.

    On hosts of one's own a path of this machine counts from its root: they mount what they share at the same place.
    Of a cluster that somebody else runs nothing is known. Raises ConfigError with a line for each that hosts of a
    cloud do not see.
    """
    if file is None:
        return dict(named)
    if file.provider == "local":
        return {key: _from_the_root(place) for key, place in named.items()}
    seen = _paths(file)
    mistakes = [
        f"{key}={place}: hosts of {file.name} do not see this machine's folders; {_right(key)} is right, "
        f"or a path that {file.path} speaks of (file_mounts, or setup_commands that mount it)"
        for key, place in named.items()
        if not _is_seen(key, place.removeprefix("file://"), seen)
    ]
    if mistakes:
        raise ConfigError(*mistakes)
    return dict(named)


def _is_seen(key: str, place: str, seen: Iterable[str]) -> bool:
    if stores.is_url(place) or any(place == path or place.startswith(f"{path}/") for path in seen):
        return True
    return key in DATA and "/" not in place and not stores.local(place).exists()


def _paths(file: ClusterFile) -> set[str]:
    """Those that a cluster file speaks of, but for paths of this machine."""
    here = ("auth", "file_mounts")
    said = json.dumps({key: value for key, value in file.config.items() if key not in here}, ensure_ascii=False)
    named = {*PATH.findall(said.replace("\\n", " ")), *(file.config.get("file_mounts") or {})}
    return {path.rstrip("/") for path in named} - {"", "~"}


def _right(key: str) -> str:
    return "a URL, or a data set by name such as cifar10," if key in DATA else "a URL"


def _from_the_root(place: str) -> str:
    is_path = not stores.is_url(place) and Path(place).exists()
    return str(Path(place).absolute()) if is_path else place
