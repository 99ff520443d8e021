"""The whole way on an AWS without a cloud, through launch.py alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distssl import config, job, monitor
from distssl.context import Context
from tests import runs
from tests.cluster import hosts
from tests.cluster.cloud import ALIVE, BUCKET, REGION, ZONE, Cloud
from tests.cluster.user import ROOT, User, wait

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # boto3 leaves its connections to the collector
]

EPOCHS = 40
SETTINGS = [
    "train.precision=float64",  # so that the order of a sum over ranks is all but invisible
    f"train.epochs={EPOCHS}",
    "eval.tasks=[]",
    "checkpoint.every=1000",  # so that the one before the host goes is that of its notice
    "name=e2e",
]


def cluster_file(cloud: Cloud, folder: Path, **changes: Any) -> Path:
    """aws-spot.yaml of the product, with the values that a user fills in and hosts that are set up already."""
    rule = {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": f"{hosts.GATEWAY}/32"}]}
    place = {"ImageId": cloud.image, "SubnetIds": [cloud.subnet]}
    worker = {
        "max_workers": 2,
        "resources": {"CPU": 1, "GPU": 0},
        "node_config": {"InstanceType": "g5.xlarge", **place},
    }
    tree = {
        "extends": str(ROOT / "cluster/aws-spot.yaml"),
        "max_workers": 2,
        "provider": {
            "region": REGION,
            "availability_zone": ZONE,
            "use_internal_ips": True,
            "security_group": {"IpPermissions": [rule]},
        },
        "auth": {"ssh_user": "root"},
        "available_node_types": {"head": {"node_config": {"InstanceType": "m5.large", **place}}, "worker": worker},
        "setup_commands": ["true"],
        "distssl": {"storage": f"s3://{BUCKET}/runs"},
        **changes,
    }
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def upload(cloud: Cloud, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            cloud.client("s3").upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder).as_posix()}")


def lines(cloud: Cloud, name: str) -> list[dict[str, Any]]:
    text = cloud.client("s3").get_object(Bucket=BUCKET, Key=f"runs/e2e/{name}")["Body"].read().decode()
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_on_spot_hosts_loses_its_client_and_a_host_and_is_the_run_of_one_machine(
    cloud: Cloud, user: User, shared: Path
) -> None:
    packed = runs.packed(shared / "photos", num=112)
    upload(cloud, packed, "shards")
    file = cluster_file(cloud, shared)

    run = runs.tiny(packed, shared / "alone", *SETTINGS)
    (shared / "run.yaml").write_text(config.dump(run))
    there = [f"data.source=s3://{BUCKET}/shards", "name=e2e", "machine.workers=2"]
    there.append(f"machine.storage=s3://{BUCKET}/runs")

    first = user.start("--cluster", file, "--detach", "--config", shared / "run.yaml", *there)
    assert first.end(240) == 0, first.said
    followed = user.start("attach", "--cluster", file)
    followed.until(lambda said: "step " in said, "a step", 240)
    followed.kill()
    spot = [one for one in cloud.instances(*ALIVE) if one.get("InstanceLifecycle") == "spot"]
    assert len({one["PrivateIpAddress"] for one in spot}) == 2

    cloud.give_notice(spot[0])
    again = user.start("attach", "e2e", "--cluster", file)
    wait(lambda: _state(cloud, spot[0]) == "terminated", "the end of the host", 120, lambda: again.said)
    assert again.end(300) == 0, again.said
    before, _, after = again.said.partition("resuming at step ")
    assert max(map(int, re.findall(r"^step (\d+)/", before, re.MULTILINE))) <= int(
        after.split()[0]
    )  # none is done twice
    assert len([one for one in cloud.instances() if one.get("InstanceLifecycle") == "spot"]) == 3

    with Context(run.run_dir) as context:
        assert job.pretrain(run, context, job.prepare(run, 1))
    ledger = monitor.read_jsonl(run.run_dir / monitor.LEDGER)
    assert lines(cloud, monitor.LEDGER) == ledger
    alone, spread = monitor.read_jsonl(run.run_dir / monitor.METRICS), lines(cloud, monitor.METRICS)
    assert [row["step"] for row in spread] == [row["step"] for row in alone]
    assert [row["loss"] for row in spread] == pytest.approx([row["loss"] for row in alone], rel=1e-4)
    saved = cloud.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="runs/e2e/checkpoints/")["Contents"]
    assert any(one["Key"].endswith(f"step_{ledger[-1]['step']:08d}/manifest.json") for one in saved)

    code, said = user.run("down", "--cluster", file)
    assert code == 0, said
    assert not cloud.instances(*ALIVE)
    rules = [rule for group in _groups(cloud) for rule in group["IpPermissions"]]
    assert not [rule for rule in rules if rule.get("IpRanges") == [{"CidrIp": "0.0.0.0/0"}]]
    assert "distssl" not in {group["GroupName"] for group in _groups(cloud)}


def _state(cloud: Cloud, instance: dict[str, Any]) -> str:
    (found,) = [one for one in cloud.instances() if one["InstanceId"] == instance["InstanceId"]]
    return found["State"]["Name"]


def _groups(cloud: Cloud) -> list[dict[str, Any]]:
    return cloud.client("ec2").describe_security_groups()["SecurityGroups"]
