"""Hosts made of namespaces: each has its own network, processes, /tmp, home and sshd, on a network of the test's own.

Nothing of it is seen from outside: the switch lies in a network namespace too, and a thread that wants to speak with
the hosts goes inside it (`Network.inside`). Needs root, iproute2, util-linux and openssh-server.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "10.77.0"
GATEWAY = f"{PREFIX}.1"
SSHD = "/usr/sbin/sshd"
CLONE_NEWNET = 0x40000000
INIT = """
hostname {name}
mount --make-rprivate /
for folder in {shared}; do
  case $folder in /root/*|/tmp/*) mkdir -p {folder}$folder; mount --bind $folder {folder}$folder;; esac
done
mount --rbind {folder}/root /root
mount --rbind {folder}/tmp /tmp
mount -t tmpfs tmpfs /run; mkdir -p /run/sshd
mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
export HOME=/root
exec {sshd} -D -e -f /dev/null -h {key} -o Port=22 -o PermitRootLogin=yes -o StrictModes=no -o UsePAM=no \\
  -o PidFile=none -o MaxStartups=100 -o MaxSessions=100 -o AuthorizedKeysFile=/root/.ssh/authorized_keys \\
  -o Subsystem="sftp internal-sftp" -o PasswordAuthentication=no
"""


class Network:
    """A switch in a network namespace, and hosts on it. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"dssl{os.getpid()}"
        self.hosts: dict[str, Host] = {}
        self.key, self.host_key = folder / "id", folder / "host_key"

    def __enter__(self) -> Network:
        for key in (self.key, self.host_key):
            call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        call("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")
        self.ip("link", "add", "switch", "type", "bridge")
        self.ip("addr", "add", f"{GATEWAY}/24", "dev", "switch")
        self.ip("addr", "add", "169.254.169.254/32", "dev", "switch")  # where a cloud's hosts look for their metadata
        self.ip("link", "set", "switch", "up")
        return self

    def __exit__(self, *exc_info: object) -> None:
        for host in list(self.hosts.values()):
            host.power_off()
        for pid in _in_namespace(self.name):  # what was left running in the switch's own namespace
            _kill(pid)
        call("ip", "netns", "del", self.name)

    def ip(self, *arguments: str) -> None:
        call("ip", "-n", self.name, *arguments)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """This thread, and what it starts, in the network of the switch."""
        with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{self.name}") as namespace:
            _enter(namespace.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())

    def host(self, name: str, address: str, public_key: str | None = None, **environment: str) -> Host:
        """Power a host on. public_key: of who may enter, ours by default; environment: of all who do."""
        host = Host(self, name, address)
        host.power_on(public_key or self.key.with_suffix(".pub").read_text(), environment)
        self.hosts[name] = host
        return host


class Host:
    def __init__(self, network: Network, name: str, address: str) -> None:
        self.network, self.name, self.address = network, name, address
        self.namespace = f"{network.name}-{name}"
        self.folder = network.folder / "hosts" / name
        self.process: subprocess.Popen[bytes]

    def power_on(self, public_key: str, environment: dict[str, str]) -> None:
        folder = self.folder
        for part in ("tmp", "root/.ssh"):
            (folder / part).mkdir(parents=True)
        (folder / "tmp").chmod(0o1777)
        (folder / "root").chmod(0o700)
        (folder / "root/.ssh/authorized_keys").write_text(public_key)
        # A Ray ends workers where the machine's memory is nearly full, and of that all hosts and tests have the same.
        exports = {
            "PATH": f"{Path(sys.executable).parent}:$PATH",
            "RAY_memory_monitor_refresh_ms": "0",
            **environment,
        }
        (folder / "root/.bashrc").write_text("".join(f"export {name}={value}\n" for name, value in exports.items()))
        (folder / "root/.profile").write_text(". ~/.bashrc\n")
        shared = {sys.prefix, sys.base_prefix}
        init = INIT.format(name=self.name, folder=folder, shared=" ".join(shared), sshd=SSHD, key=self.network.host_key)
        (folder / "init").write_text(init)
        link = f"v{len(self.network.hosts)}{os.getpid() % 10000}{self.name[-4:]}"[:15]
        call("ip", "netns", "add", self.namespace)
        self.network.ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        self.network.ip("link", "set", link, "master", "switch", "up")
        for arguments in (
            ("link", "set", "lo", "up"),
            ("link", "set", "eth0", "up"),
            ("addr", "add", f"{self.address}/24", "dev", "eth0"),
            ("route", "add", "default", "via", GATEWAY),
        ):
            call("ip", "-n", self.namespace, *arguments)
        unshare = ["unshare", "--pid", "--fork", "--mount", "--uts", "--ipc", "--mount-proc", "--kill-child=SIGKILL"]
        with open(folder / "sshd.log", "wb") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *unshare, "bash", str(folder / "init")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def has(self, name: str) -> bool:
        """Whether a file is there, by its path without the first slash."""
        return (self.folder / name).exists()

    def hang_up(self) -> None:
        """Cut its SSH connections; new ones are let in."""
        self.send(signal.SIGKILL, "sshd: root")

    def send(self, sent: signal.Signals, begin: str) -> bool:
        """Send a signal to its processes whose command lines so begin; whether there are any."""
        found = False
        for pid in _in_namespace(self.namespace):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(begin.encode()):
                    os.kill(pid, sent)
                    found = True
        return found

    def power_off(self) -> None:
        """At once, as when the plug is pulled; of one that is off, nothing."""
        if self.name not in self.network.hosts:
            return
        self.process.send_signal(signal.SIGKILL)  # unshare takes the host's first process with it
        self.process.wait()
        for pid in _in_namespace(self.namespace):
            _kill(pid)
        for _ in range(50):
            if not _in_namespace(self.namespace):
                break
            time.sleep(0.1)
        call("ip", "netns", "del", self.namespace)
        self.network.hosts.pop(self.name, None)
        shutil.rmtree(self.folder, ignore_errors=True)


def missing() -> str | None:
    """Why such hosts cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    probe = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, check=False)
    if probe.returncode:
        return f"namespaces cannot be made here: {probe.stderr.decode().strip()}"
    return None


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, check=False)
    assert not done.returncode, f"{' '.join(command)}: {done.stderr.decode()}"


def _enter(namespace: int) -> None:
    """Python has no setns before 3.12."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _in_namespace(name: str) -> list[int]:
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
