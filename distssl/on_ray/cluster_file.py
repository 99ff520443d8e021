"""A cluster file: Ray's own YAML with three additions, checked before anything that costs money is started.

`extends: FILE` takes up another cluster file, over whose keys this one's are laid (mappings merged, lists replaced).
`distssl:` holds what is ours: storage, workers, environment. A value with FILL_IN in it is not filled in yet.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from ray.autoscaler._private.util import prepare_config, validate_config

from distssl import atomic, capacity, settings
from distssl.capacity import OURS, PLACEHOLDER
from distssl.errors import ConfigError, first_line
from distssl.on_ray import spot_watcher, token
from distssl.on_ray.place import Workers, share_of_cpus

log = logging.getLogger(__name__)

FOLDER = Path("~/.cache/distssl/clusters")
PROVIDERS = ("aws", "gcp", "local")  # of Ray's, those that were tried or checked


class ClusterFile:
    """A cluster file with all that it extends.

    `name`; `provider`, Ray's word for whose machines these are; `config`, as Ray takes it, complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        tree = settings.read_extending(path, "--cluster")
        left = [
            f"{path}: {key}={value}: fill in its value" for key, value in _leaves(tree) if PLACEHOLDER in str(value)
        ]
        if left:
            raise ConfigError(*left)
        self.options = capacity.options(tree, str(path))
        tree.pop(OURS, None)
        _check_schema(path, tree)
        _check_security(path, tree)
        self.name: str = tree["cluster_name"]
        self.provider: str = tree["provider"]["type"]
        self.config = tree
        _mount(tree, self.folder)

    @property
    def folder(self) -> Path:
        """Of this cluster on this machine: the file that Ray is given, logs."""
        return FOLDER.expanduser() / self.name

    @property
    def ends(self) -> str:
        """The command that ends the cluster."""
        return f"python launch.py down --cluster {self.path}"

    def write(self) -> Path:
        """The file for Ray, the token and what the hosts are given, in `folder`."""
        atomic.make_folder(self.folder)
        (self.folder / "hosts").mkdir(exist_ok=True)
        (self.folder / "hosts" / "requirements.txt").write_text("\n".join(requirements()) + "\n")
        (self.folder / "hosts" / "spot_watcher.py").write_bytes(Path(spot_watcher.__file__).read_bytes())
        path = self.folder / "cluster.yaml"
        with atomic.replacing(path) as part:
            part.write_text(yaml.safe_dump(self.config, sort_keys=False))
        return path

    def workers(self, resources: Mapping[str, Mapping[str, float]], kept_cpus: int = 0) -> Workers:
        """The workers of the whole cluster, and what one of them takes: what the file says, else its share of a host.

        resources: node type -> what a node of it has, as Ray counts it. kept_cpus: of each node, for other work;
        where the file says what a worker takes, it takes that.
        """
        found = capacity.of(self.config, self.options, resources)
        cpus = share_of_cpus(resources.get(found.node_type, {}).get("CPU", 1), found.per_host, kept_cpus)
        share = self.options.worker or {"CPU": cpus, "GPU": int(found.on_gpus)}
        return Workers(found.most, share.get("CPU", 1), share.get("GPU", 0))


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{key}[{index}]")
    else:
        yield key, tree


def _check_schema(path: Path, tree: dict[str, Any]) -> None:
    _check_keys(path, tree, "cluster_name", "provider", "auth")
    kind = tree["provider"].get("type") if isinstance(tree["provider"], dict) else None
    if kind not in PROVIDERS:
        raise ConfigError(f"{path}: provider.type={kind}: {', '.join(PROVIDERS)} are right")
    if kind != "local":  # what Ray would fill in, but not for us
        _check_keys(path, tree, "max_workers", "head_node_type", "available_node_types")
    try:
        validate_config(prepare_config(copy.deepcopy(tree)))
    except jsonschema.ValidationError as error:
        key = ".".join(map(str, error.absolute_path))
        raise ConfigError(f"{path}: {key or 'the file'}: {error.message.splitlines()[0]}") from None
    except (ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{path}: {first_line(error)}") from None
    if kind != "local" and len(tree["available_node_types"]) == 1:
        raise ConfigError(
            f"{path}: available_node_types: {tree['head_node_type']} is the head; a worker type is missing"
        )


def _check_keys(path: Path, tree: Mapping[str, Any], *keys: str) -> None:
    missing = [key for key in keys if key not in tree]
    if missing:
        raise ConfigError(f"{path}: {', '.join(missing)} missing; cluster/aws.yaml has a whole file")


def _check_security(path: Path, tree: Mapping[str, Any]) -> None:
    """Ray's job interface runs any code, so it must neither answer strangers nor answer without the token."""
    mistakes: list[str] = []
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        if key not in tree:
            mistakes.append(f"{path}: {key}: missing, and Ray's own have no token; cluster/aws.yaml has some")
        for command in tree.get(key) or []:
            if "ray start" not in command:
                continue
            if "RAY_AUTH_MODE=token" not in command:
                mistakes.append(f"{path}: {key}: ray start without RAY_AUTH_MODE=token would obey anybody; say it")
            if "--head" in command and "--dashboard-host=127.0.0.1" not in command:
                mistakes.append(f"{path}: {key}: --dashboard-host=127.0.0.1 is right; it is reached by a tunnel")
    if mistakes:
        raise ConfigError(*mistakes)


def _mount(tree: dict[str, Any], folder: Path) -> None:
    """Every host gets the token, the packages' versions and the spot watcher, in the home of its user or container.

    Ray's updater leaves the ~ to the host's shell, or puts the image's home in its place, as for files of its own.
    """
    mounts = {str(token.FILE): str(token.FILE.expanduser()), "~/.distssl": str(folder / "hosts")}
    tree["file_mounts"] = mounts | (tree.get("file_mounts") or {})


@functools.cache
def requirements() -> tuple[str, ...]:
    """What hosts install: the dependencies of distssl, with the versions of this machine."""
    lines: list[str] = []
    for one in (Requirement(line) for line in metadata.requires("distssl") or ()):
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            one.marker, one.specifier = None, SpecifierSet(f"=={metadata.version(one.name)}")
            lines.append(str(one))
    return tuple(lines)
