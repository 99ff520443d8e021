"""An AWS account of a moto_server on loopback, and a cluster file for it, for tests that need no hosts.

Its hosts have addresses of loopback, where nobody answers SSH: what takes long on a cloud fails here at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distssl.on_ray import aws
from distssl.on_ray.cluster_file import ClusterFile
from tests import buckets
from tests.on_ray.test_cluster_file import minimal

REGION, ZONE = "us-east-1", "us-east-1a"
PROFILE = "distssl-head"


class Account:
    """name: of its cluster. Every account that is made has a VPC of its own."""

    def __init__(self, folder: Path, server: buckets.Server) -> None:
        self.folder = folder
        self.ec2, iam = server.client("ec2"), server.client("iam")
        with contextlib.suppress(iam.exceptions.EntityAlreadyExistsException):
            iam.create_instance_profile(InstanceProfileName=PROFILE)
        vpc = self.ec2.create_vpc(CidrBlock="127.77.0.0/16")["Vpc"]["VpcId"]
        made = self.ec2.create_subnet(VpcId=vpc, CidrBlock="127.77.0.0/24", AvailabilityZone=ZONE)
        self.subnet = made["Subnet"]["SubnetId"]
        self.image = self.ec2.describe_images()["Images"][0]["ImageId"]
        self.name = vpc

    def file(self, **changes: Any) -> ClusterFile:
        tree = minimal() | {"cluster_name": self.name}
        tree["provider"] |= {"region": REGION, "availability_zone": ZONE, "use_internal_ips": True}
        for kind, instance in (("head", "m5.large"), ("worker", "g5.xlarge")):
            node = {"InstanceType": instance, "ImageId": self.image, "SubnetIds": [self.subnet]}
            profile = {"IamInstanceProfile": {"Name": PROFILE}}  # or Ray makes one, and waits for it
            tree["available_node_types"][kind]["node_config"] = node | profile
        path = self.folder / "mine.yaml"
        path.write_text(yaml.safe_dump(tree | changes))
        return ClusterFile(path)

    def start(self, kind: str, status: str = "up-to-date") -> str:
        """An instance as Ray starts it; its id. kind: a node type of the file."""
        tags = {aws.TAG: self.name, "ray-node-type": kind, "ray-user-node-type": kind, "ray-node-status": status}
        made = self.ec2.run_instances(
            ImageId=self.image,
            InstanceType="m5.large",
            MinCount=1,
            MaxCount=1,
            SubnetId=self.subnet,
            TagSpecifications=[
                {"ResourceType": "instance", "Tags": [{"Key": key, "Value": tags[key]} for key in tags]}
            ],
        )
        return made["Instances"][0]["InstanceId"]

    def state(self, instance: str) -> str:
        (found,) = self.ec2.describe_instances(InstanceIds=[instance])["Reservations"]
        return found["Instances"][0]["State"]["Name"]

    def alive(self) -> list[str]:
        """The node types of what is left of the cluster."""
        filters = [{"Name": "vpc-id", "Values": [self.name]}, {"Name": "instance-state-name", "Values": list(aws.LIVE)}]
        found = self.ec2.describe_instances(Filters=filters)["Reservations"]
        return sorted(aws._tags(one)["ray-node-type"] for group in found for one in group["Instances"])


@pytest.fixture(scope="module")
def moto() -> Iterator[buckets.Server]:
    server = buckets.Server(MOTO_IAM_LOAD_MANAGED_POLICIES="true")
    yield server
    server.close()


@pytest.fixture
def account(moto: buckets.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Account:
    """The environment says where it is; a home of its own has Ray's keys."""
    buckets.point_at(monkeypatch, moto.endpoint, HOME=str(tmp_path), TMPDIR=str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    return Account(tmp_path, moto)
