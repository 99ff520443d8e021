"""A head goes on with the hosts that it was started with, and a file that has others is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distssl.errors import ConfigError
from distssl.on_ray import cluster, head, scale
from distssl.on_ray.cluster_file import ClusterFile
from distssl.on_ray.head import Found
from tests.on_ray.test_cluster_file import minimal, opened


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("HOME", str(tmp_path))
    return minimal()


def started(file: ClusterFile) -> scale.Scale | None:
    """What a head says that was started with a file: it gets what is written for it, in the words of a terminal."""
    scale.keep(file)
    return scale.parse(f"welcome\r\n{(file.write().parent / 'hosts' / scale.NAME).read_text()}\r\n")


def test_a_file_that_has_other_hosts_than_the_head_is_refused_with_what_differs(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = started(opened(tree, tmp_path))
    edited = copy.deepcopy(tree)
    edited["max_workers"] = 32
    edited["available_node_types"]["worker"]["max_workers"] = 32
    edited["available_node_types"]["worker"]["node_config"]["InstanceType"] = "g5.48xlarge"
    file = opened(edited, tmp_path)
    monkeypatch.setattr(cluster, "_look", lambda file: Found(head.ANSWERS, started=there))
    with pytest.raises(ConfigError) as caught:
        cluster.bring_up(file, str, str)
    (line,) = caught.value.messages
    for change in (
        "max_workers was 2, is 32",
        "available_node_types.worker.max_workers was not there, is 32",
        'available_node_types.worker.node_config.InstanceType was "g5.12xlarge", is "g5.48xlarge"',
        f"end the cluster first: python launch.py down --cluster {file.path}",
    ):
        assert re.search(rf"(^|[ ;]){re.escape(change)}", line), change
    assert "ImageId" not in line


def test_what_is_no_matter_of_hosts_may_change_while_the_head_is_up(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = started(opened(tree, tmp_path))
    file = opened(tree | {"distssl": {"workers": 1, "storage": "s3://b/runs"}, "setup_commands": ["true"]}, tmp_path)
    for node in file.config["available_node_types"].values():  # as `aws.keep_to_security_group` does
        node["node_config"]["SecurityGroupIds"] = ["sg-1"]
    for known in (there, None):  # None: of a head that was started without a copy
        monkeypatch.setattr(cluster, "_look", lambda file, known=known: Found(head.ANSWERS, started=known))
        assert cluster.bring_up(file, str, str) is False


def test_hosts_of_a_list_are_compared_too(tree: dict[str, Any], tmp_path: Path) -> None:
    on_premises = {
        **{key: value for key, value in tree.items() if key.endswith("commands")},
        "cluster_name": "mine",
        "provider": {"type": "local", "head_ip": "192.0.2.1", "worker_ips": ["192.0.2.2"]},
        "auth": {"ssh_user": "me"},
    }
    there = started(opened(on_premises, tmp_path))
    scale.require_same(opened(on_premises, tmp_path), there)
    on_premises["provider"]["worker_ips"].append("192.0.2.3")
    with pytest.raises(ConfigError, match=r'worker_ips was \["192.0.2.2"\], is \["192.0.2.2", "192.0.2.3"\]'):
        scale.require_same(opened(on_premises, tmp_path), there)


def test_every_host_gets_the_copy(tree: dict[str, Any], tmp_path: Path) -> None:
    file = opened(tree, tmp_path)
    scale.keep(file)
    given = yaml.safe_load(file.write().read_text())["file_mounts"]
    assert (Path(given["~/.distssl"]) / scale.NAME).exists()
    assert f"~/.distssl/{scale.NAME}" in head.HEALTH
