"""Hosts of one's own by the list of onprem.yaml, and the same cluster by the address of its dashboard."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from distssl import monitor
from distssl.downstream import rows
from tests import runs
from tests.cluster.hosts import PREFIX, Network
from tests.cluster.user import ROOT, User

pytestmark = [pytest.mark.cloud, pytest.mark.timeout(600)]

HEAD, WORKER = f"{PREFIX}.11", f"{PREFIX}.12"
SETTINGS = [one for one in runs.settings() if not one.startswith("machine.workers")]


@pytest.fixture
def network(namespaces: None, shared: Path) -> Iterator[Network]:
    (shared / "net").mkdir()
    (shared / "home").mkdir()
    with Network(shared / "net") as made, made.inside():
        made.host("head", HEAD)
        made.host("worker", WORKER)
        yield made
        for host in list(made.hosts.values()):
            host.power_off()


@pytest.fixture
def user(network: Network, shared: Path) -> Iterator[User]:
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    made = User(bare | {"HOME": str(shared / "home")}, shared)
    yield made
    made.close()


def cluster_file(network: Network, shared: Path, **environment: str) -> Path:
    """onprem.yaml with both hosts, which are set up already, and a worker on each; environment: of jobs."""
    start = "ulimit -n 65536; RAY_AUTH_MODE=token ray start --num-cpus=1"
    tree = {
        "cluster_name": f"distssl-{os.getpid()}",  # Ray's launcher notes what is up below /tmp, by this name
        "extends": str(ROOT / "cluster/onprem.yaml"),
        "provider": {"head_ip": HEAD, "worker_ips": [WORKER]},
        "auth": {"ssh_user": "root", "ssh_private_key": str(network.key)},
        "setup_commands": ["ray --version"],
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
        "distssl": {
            "storage": str(shared / "runs"),
            "workers": 2,
            "worker": {"CPU": 1, "GPU": 0},
            "environment": environment,
        },
    }
    path = shared / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_two_hosts_by_their_list_and_by_the_address_of_the_dashboard(
    network: Network, user: User, shared: Path
) -> None:
    packed = runs.packed(shared / "photos", num=112)
    file = cluster_file(network, shared)
    code, said = user.run("--cluster", file, "name=list", f"data.source={packed}", *SETTINGS, "train.epochs=2")
    assert code == 0, said
    assert "2 Ray workers" in said
    steps = monitor.read_jsonl(shared / "runs/list" / monitor.METRICS)
    assert steps[-1]["step"] == 2 * (112 // 16)
    assert {row.backbone for row in rows.read_summary(shared / "runs/list")} == {"random", "pretrained"}

    held = user.start("--cluster", file, "name=held", f"data.source={packed}", *SETTINGS, "train.epochs=400")
    held.until(lambda text: "step " in text, "a step", 120)
    (address,) = [line.split()[-1] for line in held.said.splitlines() if line.startswith("dashboard:")]
    code, said = user.run("status", "--address", address)
    assert code == 0, said
    assert "held-1" in said
    assert "running" in said
    code, said = user.run("stop", "held", "--address", address)
    assert code == 0, said
    assert "goes on from the last checkpoint" in said
    assert held.end(60) == 130, held.said
    assert list((shared / "runs/held/checkpoints").glob("step_*"))

    code, said = user.run("down", "--cluster", file)
    assert code == 0, said
