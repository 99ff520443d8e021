"""What a cluster file gives to workers, and what it must say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distssl import capacity, forecast
from distssl.errors import ConfigError
from distssl.on_ray import cluster
from distssl.on_ray.cluster_file import ClusterFile
from tests import runs, shipped, test_capacity

START = "RAY_AUTH_MODE=token ray start"


@pytest.fixture
def aws() -> dict[str, Any]:
    return minimal()


def minimal() -> dict[str, Any]:
    """As little as a file for AWS may have."""
    node = {"InstanceType": "g5.12xlarge", "ImageId": "ami-1"}
    rule = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "192.0.2.7/32"}]}
    return {
        "cluster_name": "mine",
        "max_workers": 2,
        "provider": {
            "type": "aws",
            "region": "us-east-1",
            "security_group": {"GroupName": "mine", "IpPermissions": [rule]},
        },
        "auth": {"ssh_user": "ubuntu"},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": dict(node)},
            "worker": {"resources": {}, "node_config": dict(node)},
        },
        "head_start_ray_commands": [f"{START} --head --dashboard-host=127.0.0.1"],
        "worker_start_ray_commands": [f"{START} --address=$RAY_HEAD_IP:6379"],
    }


def opened(tree: dict[str, Any], folder: Path) -> ClusterFile:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ClusterFile(path)


@pytest.mark.parametrize(("kept", "cpus"), [(0, 12), (4, 11), (5, 10), (48, 1)])
def test_workers_share_the_cpus_of_a_host_that_are_not_kept(
    aws: dict[str, Any], tmp_path: Path, kept: int, cpus: int
) -> None:
    host = {"CPU": 48, "GPU": 4}
    assert opened(aws, tmp_path).workers({"worker": host}, kept).share == {"CPU": cpus, "GPU": 1}
    said = aws | {"distssl": {"worker": {"CPU": 9, "GPU": 1}}}
    assert opened(said, tmp_path).workers({"worker": host}, kept).share == {"CPU": 9, "GPU": 1}


def test_workers_that_are_said_share_the_cpus_of_a_host(aws: dict[str, Any], tmp_path: Path) -> None:
    """Two hosts of 16 CPUs: eight workers are four a host, with or without CPUs that are kept."""
    room = opened(aws | {"distssl": {"workers": 8}}, tmp_path).workers({"worker": {"CPU": 16}})
    assert (room.most, room.share) == (8, {"CPU": 4, "GPU": 0})
    room = opened(aws | {"distssl": {"workers": 8}}, tmp_path).workers({"worker": {"CPU": 16}}, kept_cpus=4)
    assert room.share == {"CPU": 3, "GPU": 0}


@pytest.mark.parametrize(("name", "above", "lanes", "expected"), test_capacity.CASES)
def test_a_run_has_the_workers_that_plan_ends_with(
    tmp_path: Path, name: str, above: dict[str, Any], lanes: int, expected: list[tuple[int, int]]
) -> None:
    """What AWS says of an instance type is taken from the price table here."""
    tree = shipped.tree(name, **above)
    file = opened(tree, tmp_path)
    room = file.workers(capacity.listed(tree) if name.startswith("aws") else cluster.check(file))
    run = runs.tiny(tmp_path, tmp_path, f"data.global_batch={lanes}", f"data.lanes={lanes}")
    taken = max(num for num in range(1, room.most + 1) if lanes % num == 0)  # as `here` takes them
    assert taken == forecast._on_cluster(run, tree)[-1].world_size == expected[-1][1]


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("max_workers", "max_workers missing"),
        ("head_node_type", "head_node_type missing"),
        ("available_node_types", "available_node_types missing"),
        ("available_node_types.worker", "available_node_types: head is the head; a worker type is missing"),
        ("available_node_types.worker.node_config", "node_config"),
        ("available_node_types.worker.node_config.InstanceType", "worker.node_config.InstanceType: missing"),
        ("available_node_types.head.node_config.ImageId", "head.node_config.ImageId: missing"),
        ("provider.region", "provider.region: missing"),
        ("head_start_ray_commands", "head_start_ray_commands: missing, and Ray's own have no token"),
        ("worker_start_ray_commands", "worker_start_ray_commands: missing, and Ray's own have no token"),
    ],
)
def test_what_a_file_leaves_out_is_named_before_anything_is_asked(
    aws: dict[str, Any], tmp_path: Path, key: str, told: str
) -> None:
    *above, name = key.split(".")
    section = aws
    for one in above:
        section = section[one]
    del section[name]
    with pytest.raises(ConfigError) as caught:
        cluster.check(opened(aws, tmp_path))
    (message,) = caught.value.messages
    assert str(tmp_path) in message
    assert told in message
