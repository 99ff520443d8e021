"""The cluster files as they are shipped: what is filled in is enough, and what is wrong is said in a line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from distssl import prices, settings
from distssl.errors import ConfigError
from distssl.on_ray.cluster_file import ClusterFile
from tests.shipped import filled

ROOT = Path(__file__).parent.parent.parent
RAY_FILES = ("aws", "aws-spot", "gcp", "onprem", "local")


def written(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def aws(tmp_path: Path) -> dict[str, Any]:
    return filled(yaml.safe_load((ROOT / "cluster/aws.yaml").read_text()))


@pytest.mark.parametrize("name", RAY_FILES)
def test_a_file_that_is_filled_in_passes_rays_schema(name: str, tmp_path: Path) -> None:
    for path in (ROOT / "cluster").glob("*.yaml"):
        (tmp_path / path.name).write_text(yaml.safe_dump(filled(yaml.safe_load(path.read_text()))))
    file = ClusterFile(tmp_path / f"{name}.yaml")
    assert file.options.storage
    assert any(target.endswith("/.ray/auth_token") for target in file.config["file_mounts"])


@pytest.mark.parametrize("name", [name for name in RAY_FILES if name != "local"])
def test_what_is_not_filled_in_is_named(name: str) -> None:
    with pytest.raises(ConfigError) as told:
        ClusterFile(ROOT / f"cluster/{name}.yaml")
    assert all("fill in its value" in message for message in told.value.messages)
    assert any("distssl.storage" in message for message in told.value.messages)


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").glob("*.*")), ids=lambda path: path.name)
def test_a_file_says_at_its_head_what_to_fill_in_what_it_costs_and_what_has_run(path: Path) -> None:
    if path.name == "prices.yaml":
        return
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("Fill in:", "Use:", "Costs:", "Has run:"):
        assert word in head, word


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"extra": 1}, "extra"),
        ({"provider": {"type": "azure"}}, "provider.type=azure: aws, gcp, local are right"),
        ({"max_workers": "many"}, "max_workers"),
        ({"head_node_type": "nobody"}, "head_node_type"),
        ({"distssl": {"workers": 0}}, "distssl.workers=0"),
        ({"distssl": {"wokers": 2}}, "did you mean workers?"),
        ({"worker_start_ray_commands": ["ray start --address=$RAY_HEAD_IP:6379"]}, "RAY_AUTH_MODE=token"),
        (
            {"head_start_ray_commands": ["RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0"]},
            "--dashboard-host=127.0.0.1 is right",
        ),
    ],
)
def test_a_mistake_is_told_with_its_key(aws: dict[str, Any], tmp_path: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        ClusterFile(written(tmp_path, aws | change))
    assert told in " ".join(error.value.messages)
    assert str(tmp_path) in error.value.messages[0]


def test_a_file_over_another_merges_mappings_and_replaces_lists(aws: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path, aws)
    above = {
        "extends": "cluster.yaml",
        "provider": {"region": "eu-central-1"},
        "setup_commands": [],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(above))
    config = ClusterFile(tmp_path / "mine.yaml").config
    assert config["provider"] == {**aws["provider"], "region": "eu-central-1"}
    assert config["setup_commands"] == []


def test_workers_are_one_a_gpu(aws: dict[str, Any], tmp_path: Path) -> None:
    room = ClusterFile(written(tmp_path, aws)).workers({"head": {"CPU": 0}, "worker": {"CPU": 48, "GPU": 4}})
    assert (room.most, room.cpus, room.gpus) == (8, 12, 1)
    room = ClusterFile(written(tmp_path, aws)).workers({"head": {"CPU": 0}, "worker": {"CPU": 8}})
    assert (room.most, room.cpus, room.gpus) == (2, 8, 0)


def test_policies_are_no_wider_than_the_bucket_and_the_cluster() -> None:
    for path in sorted((ROOT / "cluster/iam").glob("*.json")):
        for statement in json.loads(path.read_text())["Statement"]:
            actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
            assert "*" not in actions
            assert not any(action in ("s3:*", "ec2:*", "iam:*") for action in actions)
            for action in actions:
                if action.startswith("s3:"):
                    assert "FILL_IN_BUCKET" in json.dumps(statement["Resource"])
                if action == "ec2:TerminateInstances":
                    assert "ray-cluster-name" in json.dumps(statement["Condition"])


# What KubeRay's API reference says of a RayJob, as far as ours uses it:
# https://ray-project.github.io/kuberay/reference/api/
GROUP = {
    "type": "object",
    "required": ["rayStartParams", "template"],
    "properties": {
        "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
        "template": {
            "type": "object",
            "required": ["spec"],
            "properties": {"spec": {"type": "object", "required": ["containers"]}},
        },
        **{name: {"type": "integer", "minimum": 0} for name in ("replicas", "minReplicas", "maxReplicas")},
        "groupName": {"type": "string"},
    },
    "additionalProperties": False,
}
RAY_JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["entrypoint", "rayClusterSpec"],
            "additionalProperties": False,
            "properties": {
                "entrypoint": {"type": "string"},
                "runtimeEnvYAML": {"type": "string"},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                "rayClusterSpec": {
                    "type": "object",
                    "required": ["headGroupSpec"],
                    "additionalProperties": False,
                    "properties": {
                        "rayVersion": {"type": "string"},
                        "authOptions": {"type": "object", "properties": {"mode": {"enum": ["disabled", "token"]}}},
                        "enableInTreeAutoscaling": {"type": "boolean"},
                        "autoscalerOptions": {"type": "object"},
                        "headGroupSpec": GROUP,
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {**GROUP, "required": ["groupName", "template"]},
                        },
                    },
                },
            },
        },
    },
}


def test_the_ray_job_has_the_shape_that_kuberay_takes() -> None:
    tree = yaml.safe_load((ROOT / "cluster/kuberay.yaml").read_text())
    jsonschema.validate(tree, RAY_JOB)
    environment = yaml.safe_load(tree["spec"]["runtimeEnvYAML"])["env_vars"]
    assert set(json.loads(environment["DISTSSL_WORKERS"])) == {"most", "cpus", "gpus"}


def test_the_submitter_of_the_ray_job_reaches_the_dashboard_by_the_token() -> None:
    spec = yaml.safe_load((ROOT / "cluster/kuberay.yaml").read_text())["spec"]
    assert spec["submissionMode"] == "K8sJobMode"  # a pod of its own
    assert "dashboard-host" not in spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize(("name", "spot"), [("aws", False), ("aws-spot", True), ("gcp", False)])
def test_a_head_says_the_prices_of_the_table(name: str, spot: bool) -> None:
    tree = settings.read_extending(ROOT / f"cluster/{name}.yaml", "--cluster")
    nodes = prices.nodes(tree)
    assert nodes["worker"].is_spot == spot
    costs = (ROOT / f"cluster/{name}.yaml").read_text().partition("# Costs:")[2].partition("# Has run:")[0]
    for node in nodes.values():
        assert f" {node.usd_per_hour:.2f} " in costs


def test_the_slurm_script_is_a_script() -> None:
    done = subprocess.run(["bash", "-n", ROOT / "cluster/slurm.sh"], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
