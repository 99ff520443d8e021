"""What can be known of an AWS cluster before it costs money, and the security group that Ray would open to the world.

Ray adds SSH from 0.0.0.0/0 to a group without rules: ours is made beforehand, with the rules of the cluster file. And
it looks for subnets in every VPC of the account, unless it is told a group: then in that group's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import boto3
from botocore import exceptions

from distssl.errors import ConfigError, RunError, first_line
from distssl.on_ray.cluster_file import ClusterFile

WORLD = ("0.0.0.0/0", "::/0")
TAG = "ray-cluster-name"
UP = ("pending", "running")
STOPPED = ("stopping", "stopped")  # by Ray, where a file leaves its `cache_stopped_nodes` on; the volumes cost
LIVE = (*UP, *STOPPED, "shutting-down")
GONE_S = 600  # for instances that are ended
POLL_S = 3


def check(file: ClusterFile) -> dict[str, dict[str, float]]:
    """Resources by node type. Raises ConfigError with a line for each thing that AWS does not know."""
    mistakes = [
        f"{file.path}: available_node_types.{name}.node_config.{key}: missing; cluster/aws.yaml has one"
        for name, kind in file.config["available_node_types"].items()
        for key in ("InstanceType", "ImageId")
        if not kind["node_config"].get(key)
    ]
    if mistakes:
        raise ConfigError(*mistakes)
    with said_of(file):
        client = _client(file, "ec2")
        _client(file, "sts").get_caller_identity()
        resources: dict[str, dict[str, float]] = {}
        for name, kind in file.config["available_node_types"].items():
            node, key = kind["node_config"], f"{file.path}: available_node_types.{name}.node_config"
            found = _described(client.describe_instance_types, InstanceTypes=[node["InstanceType"]])
            if not found:
                mistakes.append(f"{key}.InstanceType={node['InstanceType']}: unknown in {_region(file)}")
            if not _described(client.describe_images, ImageIds=[node["ImageId"]]):
                mistakes.append(f"{key}.ImageId={node['ImageId']}: no such image in {_region(file)}")
            subnets = node.get("SubnetIds") or ()
            if subnets and not _described(client.describe_subnets, SubnetIds=list(subnets)):
                mistakes.append(f"{key}.SubnetIds={subnets}: no such subnet in {_region(file)}")
            profile = (node.get("IamInstanceProfile") or {}).get("Name")
            if profile and not _has_profile(file, profile):
                mistakes.append(
                    f"{key}.IamInstanceProfile={profile}: not there; cluster/iam/README.md says how to make it"
                )
            resources[name] = _resources(found) | (kind.get("resources") or {})  # as Ray does it
    mistakes += [f"{file.path}: {line}" for line in _rules_mistakes(file)]
    if mistakes:
        raise ConfigError(*mistakes)
    return resources


def make_security_group(file: ClusterFile) -> None:
    """The group that the cluster file names, where it is not there yet.

    Raises ConfigError where there is one that admits the world.
    """
    with said_of(file):
        client = _client(file, "ec2")
        wanted = file.config["provider"]["security_group"]
        found = _security_groups(file, client)
        if not found:
            tags = [{"Key": TAG, "Value": file.name}, {"Key": "Name", "Value": f"{file.name}-hosts"}]
            client.create_security_group(
                GroupName=wanted["GroupName"],
                Description=f"Hosts of the Ray cluster {file.name}",
                VpcId=_vpc(file, client),
                TagSpecifications=[{"ResourceType": "security-group", "Tags": tags}],
            )
            found = _security_groups(file, client)
        group = found[0]["GroupId"]
        if not found[0]["IpPermissions"]:  # new, or left so by a start that was cut off
            among = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
            client.authorize_security_group_ingress(GroupId=group, IpPermissions=[among, *wanted["IpPermissions"]])
            found = _security_groups(file, client)
    open_to = [cidr for rule in found[0]["IpPermissions"] for cidr in _cidrs(rule) if cidr in WORLD]
    if open_to:
        raise ConfigError(f"{file.path}: security group {group} admits {open_to[0]}: remove that rule")


def keep_to_security_group(file: ClusterFile) -> None:
    """Have Ray use the group where it is there, in node_configs that name none, instead of making one of its own."""
    nodes = [kind["node_config"] for kind in file.config["available_node_types"].values()]
    bare = [node for node in nodes if "SecurityGroupIds" not in node and "NetworkInterfaces" not in node]
    if bare:
        with said_of(file):
            found = _security_groups(file, _client(file, "ec2"))
        for node in bare if found else ():
            node["SecurityGroupIds"] = [found[0]["GroupId"]]


def remove_security_group(file: ClusterFile) -> None:
    """Once the instances are gone, so that nothing is left of the cluster."""
    with said_of(file):
        client = _client(file, "ec2")
        for group in _security_groups(file, client):
            if {"Key": TAG, "Value": file.name} in group.get("Tags", []):
                client.delete_security_group(GroupId=group["GroupId"])


def instances(file: ClusterFile) -> list[dict[str, Any]]:
    """What there is of the cluster: {"id", "type" (the node type), "instance", "state", "spot"}."""
    with said_of(file):
        client = _client(file, "ec2")
        states = {"Name": "instance-state-name", "Values": list(LIVE)}
        filters = [{"Name": f"tag:{TAG}", "Values": [file.name]}, states]
        pages = client.get_paginator("describe_instances").paginate(Filters=filters)
        found = [one for page in pages for group in page["Reservations"] for one in group["Instances"]]
    return [
        {
            "id": one["InstanceId"],
            "type": _tags(one).get("ray-user-node-type", _tags(one).get("ray-node-type", "")),
            "instance": one["InstanceType"],
            "state": one["State"]["Name"],
            "spot": one.get("InstanceLifecycle") == "spot",
        }
        for one in found
    ]


def up(file: ClusterFile) -> set[str]:
    """The ids of the instances that run, or are about to."""
    return {one["id"] for one in instances(file) if one["state"] in UP}


def terminate(file: ClusterFile, ids: Sequence[str]) -> None:
    """Instances of the cluster, until they are gone. Raises RunError where that takes longer than GONE_S."""
    if not ids:
        return
    with said_of(file):
        _client(file, "ec2").terminate_instances(InstanceIds=list(ids))
    deadline = time.monotonic() + GONE_S
    while left := [f"{one['id']} ({one['state']})" for one in instances(file) if one["id"] in ids]:
        if time.monotonic() > deadline:
            raise RunError(f"{file.path}: not gone after {GONE_S} s: {', '.join(left)}. Look again: {file.ends}")
        time.sleep(POLL_S)


@contextmanager
def said_of(file: ClusterFile) -> Iterator[None]:
    """What AWS answers, in one line."""
    try:
        yield
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
        raise ConfigError(f"{file.path}: no AWS credentials; say `aws configure`, or set AWS_PROFILE") from None
    except exceptions.ClientError as error:
        code, message = error.response["Error"]["Code"], error.response["Error"]["Message"]
        raise ConfigError(f"{file.path}: AWS refuses {error.operation_name}: {code}: {message}") from None
    except (exceptions.BotoCoreError, OSError) as error:
        raise ConfigError(f"{file.path}: AWS cannot be reached: {first_line(error)}") from None


def _client(file: ClusterFile, service: str) -> Any:
    return boto3.client(service, region_name=_region(file))


def _region(file: ClusterFile) -> str:
    """Raises ConfigError where the file names none."""
    found = file.config["provider"].get("region")
    if not found:
        raise ConfigError(f"{file.path}: provider.region: missing; a region of AWS is right, for example us-east-1")
    return found


def _described(describe: Any, **wanted: Any) -> list[dict[str, Any]]:
    """What a describe_* call finds; [] where what is wanted is not there."""
    try:
        answer = describe(**wanted)
    except exceptions.ClientError as error:
        if "NotFound" in error.response["Error"]["Code"] or "Invalid" in error.response["Error"]["Code"]:
            return []
        raise
    return next(value for key, value in answer.items() if isinstance(value, list))


def _has_profile(file: ClusterFile, name: str) -> bool:
    try:
        _client(file, "iam").get_instance_profile(InstanceProfileName=name)
    except exceptions.ClientError as error:
        if error.response["Error"]["Code"] == "NoSuchEntity":
            return False
        raise
    return True


def _resources(found: list[dict[str, Any]]) -> dict[str, float]:
    """Of an instance type."""
    if not found:
        return {}
    gpus = sum(gpu["Count"] for gpu in found[0].get("GpuInfo", {}).get("Gpus", []))
    return {"CPU": found[0]["VCpuInfo"]["DefaultVCpus"], **({"GPU": gpus} if gpus else {})}


def _rules_mistakes(file: ClusterFile) -> list[str]:
    group = file.config["provider"].get("security_group") or {}
    if not group.get("GroupName") or not group.get("IpPermissions"):
        return [
            "provider.security_group: a GroupName and IpPermissions for SSH are right, or Ray opens it to the world"
        ]
    return [
        f"provider.security_group: {cidr} is the whole world; your own address, as a.b.c.d/32, is right"
        for rule in group["IpPermissions"]
        for cidr in _cidrs(rule)
        if cidr in WORLD
    ]


def _cidrs(rule: dict[str, Any]) -> list[str]:
    return [
        *(part["CidrIp"] for part in rule.get("IpRanges", ())),
        *(part["CidrIpv6"] for part in rule.get("Ipv6Ranges", ())),
    ]


def _security_groups(file: ClusterFile, client: Any) -> list[dict[str, Any]]:
    name = file.config["provider"]["security_group"]["GroupName"]
    filters = [{"Name": "group-name", "Values": [name]}, {"Name": "vpc-id", "Values": [_vpc(file, client)]}]
    return client.describe_security_groups(Filters=filters)["SecurityGroups"]


def _vpc(file: ClusterFile, client: Any) -> str:
    """Of the hosts' subnets, else the region's default."""
    subnets = {
        one for kind in file.config["available_node_types"].values() for one in kind["node_config"].get("SubnetIds", ())
    }
    if subnets:
        return client.describe_subnets(SubnetIds=sorted(subnets))["Subnets"][0]["VpcId"]
    default = client.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not default:
        raise ConfigError(f"{file.path}: {_region(file)} has no default VPC: name SubnetIds in each node_config")
    return default[0]["VpcId"]


def _tags(instance: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance.get("Tags", ())}
