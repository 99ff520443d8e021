"""The way to a cluster's head: Ray's SSH tunnel, or the address of a cluster that somebody else runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
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

Self = TypeVar("Self", bound="Way")


class Client(JobSubmissionClient):
    """Says in a line what Ray's says in a page: that nobody answers, or what the head refuses. Raises RunError."""

    def _do_request(self, *request: Any, **kwargs: Any) -> requests.Response:
        try:
            return super()._do_request(*request, **kwargs)
        except requests.RequestException as error:
            raise RunError(f"{self._address}: the connection is lost: {first_line(error)}") from None

    def _raise_error(self, r: requests.Response) -> NoReturn:
        raise RunError(f"{self._address}: {r.status_code}: {(r.text.strip().splitlines() or [''])[-1]}")


class Way:
    """Use as a context manager: leaving it closes the tunnel. `client` speaks with the jobs of the cluster."""

    def __init__(self, file: ClusterFile | None, address: str | None = None) -> None:
        self.file = file
        self.address = address
        self._tunnel: subprocess.Popen[bytes] | None = None
        self.ports = (_free(DASHBOARD), _free(TENSORBOARD)) if file else None

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}" if self.ports else str(self.address).rstrip("/")

    @property
    def tensorboard(self) -> str | None:
        """None where the head is not ours to reach."""
        return f"http://127.0.0.1:{self.ports[1]}" if self.ports else None

    def connect(self, within_s: float = ANSWERS_S) -> JobSubmissionClient:
        """A client of the cluster's jobs.

        Raises RunError where nobody answers in time, ConfigError for a wrong token.
        """
        deadline = time.monotonic() + within_s
        while True:
            self._keep_tunnel()
            try:
                return Client(self.dashboard)
            except AuthenticationError:
                raise ConfigError(f"{self.dashboard}: the token of {token.FILE} is not the cluster's") from None
            except (ConnectionError, RuntimeError, OSError) as error:
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
        if self._tunnel is not None and self._tunnel.poll() is None:
            os.killpg(self._tunnel.pid, signal.SIGTERM)  # it leads a session of its own: ssh and its shell
            self._tunnel.wait()
        self._tunnel = None

    def _keep_tunnel(self) -> None:
        """Open it, and again where it broke."""
        if self.file is None or self.ports is None or (self._tunnel is not None and self._tunnel.poll() is None):
            return
        path = cluster.written(self.file)
        pairs = list(zip(self.ports, (DASHBOARD, TENSORBOARD), strict=True))
        code = f"import sys; from ray.autoscaler.sdk import *; run_on_cluster(sys.argv[1], port_forward={pairs})"
        with open(path.with_name("tunnel.log"), "ab") as said:
            self._tunnel = subprocess.Popen(
                [sys.executable, "-c", code, str(path)],
                env=cluster.environment(self.file),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C here is not for it
            )

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
