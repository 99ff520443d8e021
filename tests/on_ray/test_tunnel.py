"""A client speaks with the head that it was sent to, and with no other; and does not wait for ever."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distssl.errors import ConfigError, RunError
from distssl.on_ray import tunnel
from distssl.on_ray.tunnel import Client, Way
from tests import debian
from tests.on_ray import ssh_hosts
from tests.on_ray.job_server import JOB, JobServer
from tests.on_ray.ssh_hosts import ADDRESSES, Hosts

of_the_launchers_notes = pytest.mark.filterwarnings("ignore:unclosed file .*/ray/cluster-:ResourceWarning")


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "http_proxy"])
def test_the_address_that_is_given_counts_and_not_one_of_the_shell(
    server: JobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with JobServer(tmp_path) as other:
        other.session = "another"
        for elsewhere in (other.url, "elsewhere://there"):
            monkeypatch.setenv(variable, elsewhere)
            client = Way(None, f"{server.url}/").connect(within_s=0)
            assert (client.get_address(), client.session) == (server.url, server.session)
        assert Way(None, server.url.removeprefix("http://")).connect(within_s=0).session == server.session


def test_an_address_that_is_no_dashboards_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--address ray://head:10001: the URL of a dashboard is right"):
        Way(None, "ray://head:10001")


def test_a_head_that_accepts_and_does_not_answer_is_given_up(
    server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "REQUEST_S", 0.3)
    client = Client(lambda: server.url)
    server.mute = "all"
    with pytest.raises(RunError, match=rf"^{server.url}: the connection is lost: [^\n]*timed out[^\n]*$"):
        client.get_job_info(JOB)
    with pytest.raises(RunError, match=r"no answer in 1 s: .*timed out"):
        Way(None, server.url).connect(within_s=1)


def test_an_upload_may_take_longer_than_an_answer(
    server: JobServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """More than the buffers on the way hold, so that it is the sending that has to wait."""
    monkeypatch.setattr(tunnel, "REQUEST_S", 0.5)
    server.upload_s = 2.0
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "big").write_bytes(os.urandom(40 << 20))
    Client(lambda: server.url).submit_job(entrypoint="true", runtime_env={"working_dir": str(tmp_path / "code")})
    assert server.uploaded > 40 << 20


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    reason = debian.install(["openssh-server", "openssh-client"])
    if reason:
        pytest.skip(reason)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    with Hosts(tmp_path).started() as made:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("PATH", f"{made.ssh}{os.pathsep}{os.environ['PATH']}")
        for port in ("DASHBOARD", "TENSORBOARD"):
            monkeypatch.setattr(tunnel, port, ssh_hosts.free_port())
        yield made


@pytest.fixture
def heads(hosts: Hosts, tmp_path: Path) -> Iterator[list[JobServer]]:
    with (
        JobServer(tmp_path, ADDRESSES[0], tunnel.DASHBOARD) as first,
        JobServer(tmp_path, ADDRESSES[1], tunnel.DASHBOARD) as second,
    ):
        second.session = "session_of_the_second"
        yield [first, second]


@of_the_launchers_notes
def test_two_clients_that_start_at_once_each_speak_with_their_own_cluster(hosts: Hosts, heads: list[JobServer]) -> None:
    """Both want the same port. The first gets it, and its head answers there before the second knows."""
    with (
        Way(hosts.file(ADDRESSES[0])) as first,
        Way(hosts.file(ADDRESSES[1])) as second,
        ThreadPoolExecutor(2) as pool,
    ):
        clients = list(pool.map(Way.connect, (first, second)))
        assert [client.session for client in clients] == [head.session for head in heads]
        assert len({first.dashboard, second.dashboard, first.tensorboard, second.tensorboard}) == 4
        assert first.dashboard == f"http://127.0.0.1:{tunnel.DASHBOARD}"


@of_the_launchers_notes
def test_what_answers_at_the_port_of_a_tunnel_that_broke_is_not_believed(
    hosts: Hosts, heads: list[JobServer], tmp_path: Path
) -> None:
    with Way(hosts.file(ADDRESSES[0])) as way:
        client = way.connect()
        before = way.dashboard
        assert client.get_job_info(JOB).submission_id == JOB
        hosts.hang_up()
        deadline = time.monotonic() + 30
        while True:
            try:
                client.get_job_info(JOB)
            except RunError as error:
                if "the tunnel is not open" in str(error):
                    break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with JobServer(tmp_path, port=tunnel.DASHBOARD) as stranger:
            stranger.session, stranger.job["submission_id"] = "a stranger's", "a stranger's"
            with pytest.raises(RunError, match="the tunnel is not open"):
                client.get_job_info(JOB)
            assert way.connect().session == heads[0].session
            assert way.dashboard != before
            assert client.get_job_info(JOB).submission_id == JOB
