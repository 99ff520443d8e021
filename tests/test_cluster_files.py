"""What the files of cluster/ say and promise, against code, prices and Ray's own sources; nothing is started."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from distssl import capacity, prices
from distssl.on_ray import place, remote
from tests import shipped

INSTANCE = "arn:aws:ec2:us-east-1:111122223333:instance/i-1"
OURS = {"aws:ResourceTag/ray-cluster-name": "distssl"}


def role(name: str) -> str:
    return f"arn:aws:iam::111122223333:role/{name}"


def allows(policy: dict[str, Any], action: str, resource: str, context: dict[str, str]) -> bool:
    """As IAM decides it, as far as our policies go: one statement that allows it, all of whose conditions hold."""
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        conditions = statement.get("Condition", {"StringEquals": {}})
        assert set(conditions) == {"StringEquals"}
        if (
            any(fnmatch.fnmatchcase(action, pattern) for pattern in statement["Action"])
            and fnmatch.fnmatchcase(resource, statement["Resource"])
            and all(context.get(key) == value for key, value in conditions["StringEquals"].items())
        ):
            return True
    return False


@pytest.mark.parametrize(
    ("action", "resource", "context", "allowed"),
    [
        ("ec2:RunInstances", INSTANCE, {}, True),
        ("ec2:CreateTags", INSTANCE, {"ec2:CreateAction": "RunInstances"}, True),
        ("ec2:CreateTags", INSTANCE, OURS, True),  # Ray's launcher notes there how far a host is
        ("ec2:TerminateInstances", INSTANCE, OURS, True),
        ("ec2:CreateTags", INSTANCE, {}, False),
        ("ec2:CreateTags", INSTANCE, {"aws:RequestTag/ray-cluster-name": "distssl"}, False),
        ("ec2:CreateTags", INSTANCE, {"aws:ResourceTag/ray-cluster-name": "another"}, False),
        ("ec2:CreateTags", INSTANCE, {"ec2:CreateAction": "CreateVolume"}, False),
        ("ec2:CreateTags", INSTANCE.replace("instance/i-1", "volume/vol-1"), OURS, False),
        ("ec2:TerminateInstances", INSTANCE, {}, False),
        ("ec2:TerminateInstances", INSTANCE, {"aws:ResourceTag/ray-cluster-name": "another"}, False),
        ("ec2:DeleteTags", INSTANCE, OURS, False),
        ("iam:PassRole", role("distssl-worker"), {}, True),
        ("iam:PassRole", role("distssl-head"), {}, False),
        ("iam:PassRole", role("administrator"), {}, False),
        ("iam:CreateServiceLinkedRole", role("aws-service-role/spot.amazonaws.com/x"), {}, False),
    ],
)
def test_the_head_tags_and_ends_the_instances_of_its_cluster_alone(
    action: str, resource: str, context: dict[str, str], allowed: bool
) -> None:
    policy = json.loads((shipped.FOLDER / "iam/head.json").read_text())
    assert allows(policy, action, resource, context) == allowed


def test_the_policies_name_the_cluster_and_the_profiles_of_the_file() -> None:
    tree, policy = shipped.tree("aws"), (shipped.FOLDER / "iam/head.json").read_text()
    assert set(re.findall(r'ray-cluster-name": "(\w+)"', policy)) == {tree["cluster_name"]}
    profiles = {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in tree["available_node_types"].values()}
    assert profiles == {"distssl-head", "distssl-worker"}


@pytest.mark.parametrize("name", ["aws-spot.yaml", "iam/README.md"])
def test_where_spot_is_asked_for_the_role_that_it_needs_is_said(name: str) -> None:
    command = "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com"
    assert command in (shipped.FOLDER / name).read_text()


@pytest.mark.parametrize("name", ["aws", "aws-spot", "gcp"])
def test_a_head_says_what_a_run_asks_for_and_what_that_costs(name: str) -> None:
    tree = shipped.tree(name)
    found = capacity.of(tree, capacity.options(tree, name), capacity.listed(tree))
    bill = prices.bill(tree, {"head": 1, found.node_type: found.num_hosts})
    said = f"{found.num_hosts} hosts, {found.most} GPUs, {bill.usd_per_hour:.0f} USD an hour"
    assert said in shipped.head(f"{name}.yaml")
    if "`max_workers: 8`" in shipped.head(f"{name}.yaml"):
        most = prices.bill(tree, {"head": 1, found.node_type: 8}).usd_per_hour
        assert f"{8 * found.per_host} GPUs, {most:.0f} USD an hour" in shipped.head(f"{name}.yaml")


def test_the_hosts_on_google_cloud_let_the_key_of_the_file_in_and_no_other() -> None:
    """Without a key of the file's, Ray puts one into the metadata of the project, which these hosts do not look at."""
    tree = shipped.tree("gcp")
    assert tree["auth"]["ssh_private_key"]
    for kind in tree["available_node_types"].values():
        items = {item["key"]: item["value"] for item in kind["node_config"]["metadata"]["items"]}
        assert items["ssh-keys"].startswith(f"{tree['auth']['ssh_user']}:")
        assert (items["block-project-ssh-keys"], items["enable-oslogin"]) == ("TRUE", "FALSE")


def test_the_disks_on_google_cloud_are_of_its_zone_and_of_a_type_that_g2_machines_take() -> None:
    tree = shipped.tree("gcp")
    for kind in tree["available_node_types"].values():
        (disk,) = kind["node_config"]["disks"]
        zone = tree["provider"]["availability_zone"]
        assert disk["initializeParams"]["diskType"] == f"zones/{zone}/diskTypes/pd-balanced"


def test_the_roles_that_ray_gives_its_service_account_on_google_cloud_are_said() -> None:
    """And no host runs as it: the head's, which Ray would, names another."""
    source = (Path(ray.__file__).parent / "autoscaler/_private/gcp/config.py").read_text()
    given = source.partition("DEFAULT_SERVICE_ACCOUNT_ROLES = [")[2].partition("]")[0]
    head = shipped.head("gcp.yaml")
    assert "ray-autoscaler-sa-v1" in head
    assert 'RAY + "-sa-" + VERSION' in source
    for name in re.findall(r'"(roles/[\w.]+)"', given):
        assert name in head.partition("Rights:")[2], name
    for kind in shipped.tree("gcp")["available_node_types"].values():
        (account,) = kind["node_config"]["serviceAccounts"]
        assert account["email"]


def test_a_ray_job_has_the_environment_of_every_other_job() -> None:
    spec = yaml.safe_load((shipped.FOLDER / "kuberay.yaml").read_text())["spec"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    expected = {**place.ENVIRONMENT, **remote.OF_JOBS}
    assert {name: environment.get(name) for name in expected} == expected


def test_a_ray_job_asks_for_the_workers_that_its_hosts_have_room_for() -> None:
    spec = yaml.safe_load((shipped.FOLDER / "kuberay.yaml").read_text())["spec"]
    room = place.Workers(**json.loads(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"][place.WORKERS]))
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    per_host = int(limits["nvidia.com/gpu"])
    assert room == place.Workers(group["maxReplicas"] * per_host, int(limits["cpu"]) // per_host, 1)


@pytest.mark.parametrize(("gpus", "ranks"), [("4", 4), (None, 1)])
def test_a_rank_under_slurm_has_the_cores_that_the_job_asks_for(tmp_path: Path, gpus: str | None, ranks: int) -> None:
    """srun of Slurm 22.05 and later asks for one core where it is told nothing; here it prints what it is told."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "OMP_NUM_THREADS=$OMP_NUM_THREADS" "$@"\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    job = {"SUBMIT_DIR": str(tmp_path), "JOB_NODELIST": "node[7-8]", "NNODES": "2", "JOB_ID": "9"}
    job["CPUS_PER_TASK"] = "48"
    environment = {f"SLURM_{key}": value for key, value in job.items()} | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    if gpus:
        environment["SLURM_GPUS_ON_NODE"] = gpus
    command = ["bash", str(shipped.FOLDER / "slurm.sh"), "name=mine", "train.epochs=2"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert said[:3] == [f"OMP_NUM_THREADS={48 // ranks}", "--cpus-per-task=48", ".venv/bin/torchrun"]
    assert said[said.index("--nproc-per-node") + 1] == str(ranks)
    assert said[said.index("--rdzv-endpoint") + 1] == "node7:29500"
    assert said[-4:] == ["launch.py", "pretrain", "name=mine", "train.epochs=2"]
