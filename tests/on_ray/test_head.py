"""What is there of a cluster, on a cloud of Ray's kind "external": a provider of this file speaks for its head."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from ray.autoscaler._private import providers
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.node_provider import NodeProvider

from distssl.on_ray import head, scale

UP = "up-to-date"
STARTED = {"max_workers": 2}


class Cloud(NodeProvider):
    """provider_config: its hosts by name with (kind, status), and whether its head has SSH and Ray."""

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        found = ((name, self.node_tags(name)) for name in self.provider_config["hosts"])
        return [name for name, tags in found if tag_filters.items() <= tags.items()]

    def node_tags(self, node_id: str) -> dict[str, str]:
        kind, status = self.provider_config["hosts"][node_id]
        return {"ray-node-type": kind, "ray-user-node-type": f"my_{kind}", "ray-node-status": status}

    def get_command_runner(self, *given: Any, **options: Any) -> Any:
        assert given[1] == "a"  # the host that is asked
        return Host(self.provider_config)

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config

    @staticmethod
    def fillout_available_node_types_resources(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config


class Host:
    """What runs commands on the head; a terminal's words come before and after theirs."""

    def __init__(self, has: dict[str, Any]) -> None:
        self.has = has

    def run(self, command: str, **how: Any) -> bytes:
        is_health = command == head.HEALTH
        if not self.has["ssh"] or (is_health and not self.has["ray"]):
            raise click.ClickException("no answer")
        return f"welcome\r\n{scale.MARK}{json.dumps(STARTED)}\r\nbye\r\n".encode() if is_health else b"pgrep=1\r\n"


@pytest.fixture(autouse=True)
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray keeps a provider, and the config that it made, for the next call."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    providers._clear_provider_cache()


def look(folder: Path, hosts: dict[str, tuple[str, str]], **more: Any) -> head.Found:
    node = {"node_config": {}, "resources": {}}
    steps = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray")
    tree = {
        **{f"{step}_commands": [] for step in steps},
        "file_mounts": {},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
        "cluster_name": "mine",
        "max_workers": 2,
        "provider": {"type": "external", "module": f"{__name__}.Cloud", "hosts": hosts, "ssh": True, **more},
        "auth": {"ssh_user": "root"},
        "head_node_type": "my_head",
        "available_node_types": {"my_head": node, "my_worker": node},
    }
    path = folder / "cluster.yaml"
    path.write_text(json.dumps(tree))
    return head.look(path)


@pytest.mark.parametrize(
    ("hosts", "has", "state"),
    [
        ({}, {}, head.NONE),
        ({"w": ("worker", UP)}, {}, head.HEADLESS),
        ({"a": ("head", "uninitialized")}, {}, head.SETTING_UP),
        ({"a": ("head", "setting-up")}, {}, head.SETTING_UP),
        ({"a": ("head", "update-failed")}, {}, head.SILENT),
        ({"a": ("head", UP)}, {"ssh": False}, head.UNREACHABLE),
        ({"a": ("head", UP)}, {"ray": False}, head.SILENT),
        ({"a": ("head", UP), "w": ("worker", UP)}, {"ray": True}, head.ANSWERS),
        ({"old": ("head", "update-failed"), "a": ("head", UP)}, {"ray": True}, head.ANSWERS),
    ],
)
def test_what_is_there(tmp_path: Path, hosts: dict[str, tuple[str, str]], has: dict[str, Any], state: str) -> None:
    found = look(tmp_path, hosts, **has)
    assert found.state == state
    assert found.hosts == [{"id": name, "type": f"my_{kind}"} for name, (kind, _) in hosts.items()]
    assert found.started == (STARTED if state == head.ANSWERS else None)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the launcher leaves the file of its notes open
def test_the_launcher_finds_a_head_of_ones_own_that_it_has_noted_as_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    tree = {
        "cluster_name": "mine",
        "provider": {"type": "local", "head_ip": "192.0.2.1", "worker_ips": ["192.0.2.2"]},
        "auth": {"ssh_user": "root"},
    }
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps(tree))
    provider = providers._get_node_provider(prepare_config(tree)["provider"], "mine")
    assert provider.non_terminated_nodes({}) == []
    head.note(path)
    assert provider.non_terminated_nodes({"ray-node-type": "head"}) == ["192.0.2.1"]
    provider.terminate_node("192.0.2.1")  # as a `down` does that could not reach it
    head.note(path)
    assert provider.non_terminated_nodes({"ray-node-type": "head"}) == ["192.0.2.1"]
