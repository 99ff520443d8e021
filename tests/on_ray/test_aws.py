"""The security group of a cluster on AWS, on an account of moto's that has two VPCs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from moto.ec2.models.instances import Instance
from ray.autoscaler._private.aws import config as rays
from ray.autoscaler._private.util import prepare_config

from distssl.errors import ConfigError, RunError
from distssl.on_ray import aws, cluster
from distssl.on_ray.cluster_file import ClusterFile
from tests.on_ray.test_cluster_file import minimal

REGION, ZONE = "us-east-1", "us-east-1a"
HOME = "192.0.2.7/32"


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with mock_aws():
        yield boto3.client("ec2", region_name=REGION)


@pytest.fixture
def file(ec2: Any, tmp_path: Path) -> ClusterFile:
    """Its hosts may lie in any subnet; the account's first one in the zone is not in the default VPC."""
    subnets = ec2.describe_subnets(Filters=[{"Name": "availability-zone", "Values": [ZONE]}])["Subnets"]
    (default,) = subnets
    ec2.delete_subnet(SubnetId=default["SubnetId"])
    other = ec2.create_vpc(CidrBlock="10.1.0.0/16")["Vpc"]["VpcId"]
    for vpc, block in ((other, "10.1.0.0/24"), (default["VpcId"], default["CidrBlock"])):
        made = ec2.create_subnet(VpcId=vpc, CidrBlock=block, AvailabilityZone=ZONE)["Subnet"]["SubnetId"]
        ec2.modify_subnet_attribute(SubnetId=made, MapPublicIpOnLaunch={"Value": True})
    tree = minimal()
    tree["provider"]["availability_zone"] = ZONE
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return ClusterFile(path)


def groups(ec2: Any) -> list[dict[str, Any]]:
    return [one for one in ec2.describe_security_groups()["SecurityGroups"] if one["GroupName"] != "default"]


def admitted(group: dict[str, Any]) -> list[str]:
    return [cidr for rule in group["IpPermissions"] for cidr in aws._cidrs(rule)]


def as_ray_starts_hosts(file: ClusterFile) -> dict[str, Any]:
    """The node_configs that Ray makes of the file that it is given."""
    config = prepare_config(copy.deepcopy(yaml.safe_load(cluster.written(file).read_text())))
    config = rays._configure_security_group(rays._configure_subnet(config))
    return {name: kind["node_config"] for name, kind in config["available_node_types"].items()}


def test_ray_keeps_to_the_vpc_of_the_group_and_makes_none_of_its_own(ec2: Any, file: ClusterFile) -> None:
    aws.make_security_group(file)
    nodes = as_ray_starts_hosts(file)
    (group,) = groups(ec2)
    assert admitted(group) == [HOME]
    assert {tuple(node["SecurityGroupIds"]) for node in nodes.values()} == {(group["GroupId"],)}
    for node in nodes.values():
        (subnet,) = ec2.describe_subnets(SubnetIds=node["SubnetIds"])["Subnets"]
        assert subnet["VpcId"] == group["VpcId"]


def test_a_group_that_was_left_without_rules_gets_them(ec2: Any, file: ClusterFile) -> None:
    aws.make_security_group(file)
    (group,) = groups(ec2)
    ec2.revoke_security_group_ingress(GroupId=group["GroupId"], IpPermissions=group["IpPermissions"])
    aws.make_security_group(file)
    (again,) = groups(ec2)
    assert again["IpPermissions"] == group["IpPermissions"]
    assert admitted(again) == [HOME]


def test_a_group_that_admits_the_world_is_refused(ec2: Any, file: ClusterFile) -> None:
    aws.make_security_group(file)
    (group,) = groups(ec2)
    world = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    ec2.authorize_security_group_ingress(GroupId=group["GroupId"], IpPermissions=[world])
    with pytest.raises(ConfigError, match=r"admits 0\.0\.0\.0/0: remove that rule"):
        aws.make_security_group(file)


def test_down_of_a_cluster_that_is_not_up_leaves_nothing(
    ec2: Any, file: ClusterFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_sdk", lambda *given: pytest.fail("Ray's launcher would make a group to end it"))
    aws.make_security_group(file)
    for _ in range(2):
        cluster.down(file)
        assert not groups(ec2)


def test_instances_that_do_not_end_are_named_and_the_cloud_is_not_said_to_be_away(
    ec2: Any, file: ClusterFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An AWS that ends none."""
    tags = [{"Key": aws.TAG, "Value": file.name}]
    made = ec2.run_instances(
        ImageId="ami-1", MinCount=1, MaxCount=1, TagSpecifications=[{"ResourceType": "instance", "Tags": tags}]
    )
    name = made["Instances"][0]["InstanceId"]

    def still(self: Instance, *given: Any, **options: Any) -> str:
        self._state.name = "shutting-down"
        return "running"

    monkeypatch.setattr(Instance, "terminate", still)
    monkeypatch.setattr(aws, "GONE_S", 0)
    with pytest.raises(
        RunError, match=rf"not gone after 0 s: {name} \(shutting-down\)\. Look again: python launch.py down"
    ):
        aws.terminate(file, [name])
