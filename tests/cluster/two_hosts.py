"""A cluster of two hosts by the list of onprem.yaml, and its user, for the tests that want no cloud."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import yaml

from tests import buckets, runs
from tests.cluster.hosts import PREFIX, Network
from tests.cluster.user import ROOT, User

HEAD, WORKER = f"{PREFIX}.11", f"{PREFIX}.12"
WORKER_PROCESS = "ray::RayTrainWorker"
SETTINGS = [one for one in runs.settings() if not one.startswith("machine.workers")]


class TwoHosts:
    """Running, but no cluster yet. shared: a folder that both and the user see."""

    def __init__(self, network: Network, shared: Path) -> None:
        self.network, self.shared = network, shared
        self.of_jobs: dict[str, str] = {}  # their environment
        bare = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
        self.user = User(bare | {"HOME": str(shared / "home")}, shared)

    def reach(self, store: buckets.Server) -> None:
        """Have the user, and jobs by `file`, speak with an object store."""
        self.of_jobs = buckets.KEYS
        self.user.environment = {**self.user.environment, **buckets.KEYS, "AWS_ENDPOINT_URL": store.endpoint}

    @contextlib.contextmanager
    def training_paused(self) -> Iterator[None]:
        """Workers stand still while the block runs: they leave their CPUs to it."""
        hosts = self.network.hosts.values()
        assert any([host.send(signal.SIGSTOP, WORKER_PROCESS) for host in hosts])
        try:
            yield
        finally:
            for host in hosts:
                host.send(signal.SIGCONT, WORKER_PROCESS)

    def file(self) -> Path:
        """onprem.yaml with both hosts, which are set up already, and a worker on each."""
        start = "ulimit -n 65536; RAY_AUTH_MODE=token ray start --num-cpus=1"
        tree = {
            "cluster_name": f"distssl-{os.getpid()}",  # Ray's launcher notes what is up below /tmp, by this name
            "extends": str(ROOT / "cluster/onprem.yaml"),
            "provider": {"head_ip": HEAD, "worker_ips": [WORKER]},
            "auth": {"ssh_user": "root", "ssh_private_key": str(self.network.key)},
            "setup_commands": ["true"],
            "head_start_ray_commands": [
                "ray stop",
                f"{start} --head --port=6379 --dashboard-host=127.0.0.1 "
                "--autoscaling-config=~/ray_bootstrap_config.yaml",
            ],
            "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
            "distssl": {
                "storage": str(self.shared / "runs"),
                "workers": 2,
                "worker": {"CPU": 1, "GPU": 0},
                "environment": self.of_jobs,
            },
        }
        path = self.shared / "mine.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path


@contextlib.contextmanager
def started(shared: Path) -> Iterator[TwoHosts]:
    """Ended with the block, in a network of their own."""
    (shared / "net").mkdir()
    (shared / "home").mkdir()
    with Network(shared / "net") as network, network.inside():
        network.host("head", HEAD)
        network.host("worker", WORKER)
        pair = TwoHosts(network, shared)
        yield pair
        pair.user.close()
        for host in list(network.hosts.values()):
            host.power_off()
