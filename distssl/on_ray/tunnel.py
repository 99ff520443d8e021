"""The way to a cluster's head: Ray's SSH tunnel, or the address of a cluster that somebody else runs."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from distssl.errors import ConfigError, RunError, first_line
from distssl.on_ray import cluster, token
from distssl.on_ray.cluster_file import ClusterFile

DASHBOARD, TENSORBOARD = 8265, 6006  # ports of the head, and here where they are free
ANSWERS_S = 90  # the dashboard of a head that has just started may take its time
TRY_S = 1.0
REQUEST_S, UPLOAD_S = 60, 600  # an upload's is for all its bytes
NO_PROXY = {"http://127.0.0.1": ""}  # for a tunnel; else the shell's variables say

Self = TypeVar("Self", bound="Way")


class Client(JobSubmissionClient):
    """Ray's, with a limit to the time of a request, and errors of one line: nobody answers, or what the head refuses.

    find: called before each request; the address to speak with, whatever the shell's variables say, or a RunError.
    `session` is the name of the head's: another one is another head's. Raises RunError.
    """

    def __init__(self, find: Callable[[], str]) -> None:
        self._find = find
        super(JobSubmissionClient, self).__init__(find())  # its own looks for RAY_ADDRESS first, whatever it is given
        self._check_connection_and_version("2.0")
        self.session: str | None = self._do_request("GET", "/api/version").json().get("session_name")

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        self._address = self._find()
        limit_s = UPLOAD_S if method == "PUT" else REQUEST_S
        try:
            return super()._do_request(method, endpoint, timeout=limit_s, proxies=NO_PROXY, **kwargs)
        except requests.RequestException as error:
            raise RunError(f"{self._address}: the connection is lost: {first_line(error)}") from None

    def _raise_error(self, r: requests.Response) -> NoReturn:
        raise RunError(f"{self._address}: {r.status_code}: {(r.text.strip().splitlines() or [''])[-1]}")


class Tunnel:
    """Ports of this machine that lead to the head's, by a process of Ray's launcher, which starts ssh.

    path: the cluster file as Ray takes it. wanted: the ports, where they are free.
    """

    def __init__(self, path: Path, environment: Mapping[str, str], wanted: Sequence[int]) -> None:
        self.ports = [_free(port) for port in wanted]
        self._log, self._word, self._was_open = path.with_name("tunnel.log"), secrets.token_hex(8), False
        # ssh comes to the command once the ports are its own. Before, somebody else's tunnel may be behind them.
        there = f"printf '%s is open\\n' {self._word}; while true; do sleep 86400; done"
        pairs = list(zip(self.ports, (DASHBOARD, TENSORBOARD), strict=True))
        options = f"cmd={there!r}, run_env='host', port_forward={pairs}"
        code = f"import sys; from ray.autoscaler.sdk import *; run_on_cluster(sys.argv[1], {options})"
        with open(self._log, "ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(path)],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C here is not for it
            )

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def is_open(self) -> bool:
        self._was_open = self._was_open or f"{self._word} is open".encode() in self._log.read_bytes()
        return self._was_open and not self.has_ended

    def close(self) -> None:
        if not self.has_ended:
            os.killpg(self._process.pid, signal.SIGTERM)  # it leads a session of its own: ssh and its shell
            self._process.wait()


class Way:
    """Use as a context manager: leaving it closes the tunnel. `client` speaks with the jobs of the cluster.

    Raises ConfigError for an address that is no URL of a dashboard.
    """

    def __init__(self, file: ClusterFile | None, address: str | None = None) -> None:
        if address and "://" in address and not address.startswith(("http://", "https://")):
            raise ConfigError(f"--address {address}: the URL of a dashboard is right, for example http://HOST:8265")
        self.file = file
        self._address = address if address is None or "://" in address else f"http://{address}"
        self._path: Path | None = None
        self._tunnel: Tunnel | None = None
        self._ports: Sequence[int] = (DASHBOARD, TENSORBOARD)

    @property
    def dashboard(self) -> str:
        """Of a tunnel, from `connect` on; after a broken connection its port may be another."""
        return f"http://127.0.0.1:{self._ports[0]}" if self.file else str(self._address).rstrip("/")

    @property
    def tensorboard(self) -> str | None:
        """None where the head is not ours to reach."""
        return f"http://127.0.0.1:{self._ports[1]}" if self.file else None

    def connect(self, within_s: float = ANSWERS_S) -> Client:
        """A client of the cluster's jobs, which goes by the tunnel that there is at the time.

        Raises RunError where nobody answers in time, ConfigError for a wrong token.
        """
        deadline = time.monotonic() + within_s
        while True:
            self._keep_tunnel()
            try:
                return Client(self._find)
            except AuthenticationError:
                raise ConfigError(f"{self.dashboard}: the token of {token.FILE} is not the cluster's") from None
            except (RuntimeError, OSError) as error:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"{self.dashboard}: no answer in {within_s:.0f} s: {first_line(error)}{self._words()}"
                    ) from None
            time.sleep(TRY_S)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        if self._tunnel is not None:
            self._tunnel.close()
        self._tunnel = None

    def _keep_tunnel(self) -> None:
        """Open it, and again where it broke, by the same ports where they are still free."""
        if self.file is None or (self._tunnel is not None and not self._tunnel.has_ended):
            return
        self._path = self._path or cluster.written(self.file)  # once: a cloud that is asked may be out of reach later
        self._tunnel = Tunnel(self._path, cluster.environment(self.file), self._ports)
        self._ports = self._tunnel.ports

    def _find(self) -> str:
        """Where the head answers.

        Raises RunError where the tunnel is not open: nobody answers at its port, or another cluster's head.
        """
        if self.file and not (self._tunnel is not None and self._tunnel.is_open):
            raise RunError(f"{self.dashboard}: the connection is lost: the tunnel is not open")
        return self.dashboard

    def _words(self) -> str:
        return f"; {self.file.folder / 'tunnel.log'} has the tunnel's words" if self.file else ""


def _free(wanted: int) -> int:
    """The port, or another where it is taken on this machine."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise RunError("no port of this machine is free")
