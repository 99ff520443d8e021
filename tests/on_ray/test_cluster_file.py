"""What a cluster file gives to workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from distssl.on_ray.cluster_file import ClusterFile

START = "RAY_AUTH_MODE=token ray start"


@pytest.fixture
def aws() -> dict[str, Any]:
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
