"""What decides how many hosts a head starts, and of which kind: kept with the head, for it goes on as it was started.

The copy lies among the files that every host is given, so that it is always that of the head that answers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from distssl import atomic
from distssl.errors import ConfigError
from distssl.on_ray.cluster_file import ClusterFile

NAME = "started.json"
MARK = "started with: "
KEYS = ("max_workers", "head_node_type", "available_node_types")

Scale = dict[str, Any]  # dotted key of the cluster file -> value


def of(file: ClusterFile) -> Scale:
    """Of a cluster file."""
    config = file.config
    tree = {key: config[key] for key in KEYS if key in config}
    if file.provider == "local":
        tree["provider"] = {"worker_ips": config["provider"].get("worker_ips") or []}
    # Our own group is added to the node types once it is there: see `aws.keep_to_security_group`.
    leaves = {key: value for key, value in _leaves(tree) if "SecurityGroupIds" not in key}
    return json.loads(json.dumps(leaves, default=str))


def keep(file: ClusterFile) -> None:
    """Put the copy where the launcher takes it from to a head that it starts."""
    folder = file.folder / "hosts"
    atomic.make_folder(folder)
    (folder / NAME).write_text(f"{MARK}{json.dumps(of(file))}\n")


def parse(said: str) -> Scale | None:
    """What a head says, which may be more; None where it was started without a copy."""
    found = re.search(rf"{MARK}(\{{.*\}})", said)
    return json.loads(found[1]) if found else None


def require_same(file: ClusterFile, started: Scale | None) -> None:
    """Raises ConfigError in one line where a head was started with another scale than the file has now."""
    ours = of(file)
    if started is None or started == ours:
        return
    keys = sorted(key for key in {*started, *ours} if started.get(key) != ours.get(key))
    changes = "; ".join(f"{key} was {_said(started, key)}, is {_said(ours, key)}" for key in keys)
    raise ConfigError(
        f"{file.path}: the cluster {file.name} is up with other hosts: {changes}. "
        f"Put it back as it was, or end the cluster first: {file.ends}"
    )


def _said(scale: Scale, key: str) -> str:
    return json.dumps(scale[key]) if key in scale else "not there"


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, tree
