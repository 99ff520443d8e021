"""Heads that are reached by SSH, made of one sshd on addresses of this machine's own, as far as a tunnel needs them.

`ssh`, as the tunnel's process finds it, goes to that sshd, and what it calls localhost there is the head's own address.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml
from ray.autoscaler._private.local.node_provider import record_local_head_state_if_needed
from ray.autoscaler._private.providers import _get_node_provider

from distssl.on_ray import jobs
from distssl.on_ray.cluster_file import ClusterFile

SSHD = "/usr/sbin/sshd"
ADDRESSES = ("127.0.0.2", "127.0.0.3")  # the second takes longer to reach
SSH = """#!{python}
import os, sys, time
(head,) = [one.partition("@")[2] for one in sys.argv[1:] if one.startswith("{user}@")]
time.sleep(3 * (head == "{slow}"))
os.execv("/usr/bin/ssh", ["ssh", "-p", "{port}", *(one.replace(":localhost:", f":{{head}}:") for one in sys.argv[1:])])
"""


class Hosts:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = folder / "id"
        self.ssh = folder / "bin"  # of the PATH
        self._notes: list[Path] = []

    @contextlib.contextmanager
    def started(self) -> Iterator[Hosts]:
        for key in (self.key, self.folder / "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        port = free_port()
        self.ssh.mkdir()
        made = SSH.format(python=sys.executable, user=getpass.getuser(), slow=ADDRESSES[1], port=port)
        (self.ssh / "ssh").write_text(made)
        (self.ssh / "ssh").chmod(0o755)
        options = {
            "Port": port,
            "PermitRootLogin": "yes",
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
            "PasswordAuthentication": "no",
            "AuthorizedKeysFile": self.key.with_suffix(".pub"),
        }
        listen = [f"-oListenAddress={address}" for address in ADDRESSES]
        given = [*listen, *(f"-o{name}={value}" for name, value in options.items())]
        with open(self.folder / "sshd.log", "wb") as log:
            self._sshd = psutil.Popen(
                [SSHD, "-D", "-e", "-f", "/dev/null", "-h", str(self.folder / "host_key"), *given], stderr=log
            )
        try:
            yield self
        finally:
            self.hang_up()
            self._sshd.kill()
            self._sshd.wait()
            for path in self._notes:
                path.unlink(missing_ok=True)

    def hang_up(self) -> None:
        """Cut the SSH connections."""
        for process in self._sshd.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def file(self, address: str) -> ClusterFile:
        """Of a cluster whose head is up at that address."""
        name = f"distssl-{os.getpid()}-{address[-1]}"
        tree = {
            "cluster_name": name,
            "extends": str(jobs.ROOT / "cluster/onprem.yaml"),
            "provider": {"head_ip": address, "worker_ips": []},
            "auth": {"ssh_user": getpass.getuser(), "ssh_private_key": str(self.key)},
            "distssl": {"storage": str(self.folder / "runs"), "workers": 1},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        file = ClusterFile(path)
        notes = Path(tempfile.gettempdir()) / "ray"  # where Ray's launcher notes what is up
        notes.mkdir(exist_ok=True)
        self._notes += [notes / f"cluster-{name}.{kind}" for kind in ("state", "lock")]
        record_local_head_state_if_needed(_get_node_provider(file.config["provider"], name, use_cache=False))
        return file


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
