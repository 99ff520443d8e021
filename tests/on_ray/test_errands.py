"""A command leaves as its job leaves, and leaves no cluster that costs without a word, on an account of moto's."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from rich.console import Console

from distssl.errors import ConfigError, RunError
from distssl.on_ray import cluster, commands, errands, jobs, reaper
from distssl.on_ray.remote import LET_GO, Cluster, Errand
from distssl.on_ray.target import Target
from distssl.on_ray.tunnel import Client, Way
from tests.on_ray.account import Account

COSTS = "1 host, about 0.10 USD an hour"
ERRAND = Errand("mine", ["pretrain"])


class Dashboard:
    """What answers on a head: its jobs by name, of which it takes more."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, status: str = "RUNNING", kind: str = "work") -> None:
        metadata = {"project": jobs.PROJECT, "kind": kind, jobs.NAME: name}
        identity = {"type": "SUBMISSION", "submission_id": f"{name}-1", "entrypoint": "python launch.py"}
        self.jobs.append({**identity, "status": status, "metadata": metadata})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        head = self

        class Answers(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": "x"}
                job = [one for one in head.jobs if self.path.endswith(one["submission_id"])]
                found: Any = job[0] if job else {"/api/version": version}.get(self.path, head.jobs)
                text = json.dumps(found).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *arguments: object) -> None:
                """It says nothing."""

        return Answers


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    made = Dashboard()
    yield made
    made.close()


@pytest.fixture
def there(
    account: Account,
    dashboard: Dashboard,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Cluster]:
    """A cluster whose head takes no time to come up and answers by `dashboard`, without a tunnel."""

    def comes_up(*given: object) -> bool:
        account.start("head")
        return True

    monkeypatch.setattr(cluster, "bring_up", comes_up)
    monkeypatch.setattr(cluster, "is_up", lambda file: True)
    monkeypatch.setattr(Way, "connect", lambda *given, **options: Client(lambda: dashboard.url))
    file = account.file()
    return lambda **options: Cluster(Target(file.path, None, **options), Console(width=400))


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*given: object, **options: object) -> None:
        raise error

    return call


@pytest.mark.parametrize("error", [RunError("no answer in 90 s"), KeyboardInterrupt()])
def test_a_cluster_that_came_up_for_nothing_is_ended_or_said_to_cost(
    there: Callable[..., Cluster],
    account: Account,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Way, "connect", raising(error))
    with pytest.raises(type(error)):
        errands.run(there(), ERRAND)
    assert account.alive() == ["head"]
    ends = f"End it: python launch.py down --cluster {account.folder}/mine.yaml"
    assert f"{account.name} stays up: {COSTS}" in (said := capsys.readouterr().out)
    assert ends in said

    with pytest.raises(type(error)):
        errands.run(there(down_when_done=True), ERRAND)
    assert account.alive() == []
    assert "taking" in (said := capsys.readouterr().out)
    assert ends not in said


def test_a_cluster_on_which_somebody_works_is_not_ended_by_an_error(
    there: Callable[..., Cluster],
    account: Account,
    dashboard: Dashboard,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dashboard.add("theirs")
    monkeypatch.setattr(Cluster, "submit", raising(ConfigError("other settings")))
    with pytest.raises(ConfigError):
        errands.run(there(down_when_done=True), ERRAND)
    assert account.alive() == ["head"]
    assert "job theirs-1 is running on" in capsys.readouterr().out


@pytest.mark.parametrize("down_when_done", [False, True])
@pytest.mark.parametrize("code", [0, 2])
def test_a_head_that_is_gone_after_the_end_of_a_job_does_not_change_its_exit_code(
    there: Callable[..., Cluster],
    dashboard: Dashboard,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    down_when_done: bool,
) -> None:
    def follow(*given: object) -> int:
        dashboard.close()
        return code

    monkeypatch.setattr(Cluster, "submit", lambda *given: "mine-1")
    monkeypatch.setattr(Cluster, "follow", follow)
    assert errands.run(there(down_when_done=down_when_done), ERRAND) == code
    assert "is not known" in capsys.readouterr().out


def test_a_price_that_is_not_known_after_the_end_of_a_job_does_not_change_its_exit_code(
    there: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def follow(*given: object) -> int:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        return 0

    monkeypatch.setattr(Cluster, "submit", lambda *given: "mine-1")
    monkeypatch.setattr(Cluster, "follow", follow)
    assert errands.run(there(), ERRAND) == 0
    assert "the cluster is up: what it costs is not known: " in capsys.readouterr().out


def test_a_cluster_that_is_not_ended_after_its_job_makes_the_command_fail(
    there: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cluster, "submit", lambda *given: "mine-1")
    monkeypatch.setattr(Cluster, "follow", lambda *given: 0)
    monkeypatch.setattr(cluster, "down", raising(RunError("not gone")))
    with pytest.raises(RunError, match="not gone"):
        errands.run(there(down_when_done=True), ERRAND)


def test_commands_after_which_no_job_runs_say_that_the_cluster_is_up(
    there: Callable[..., Cluster],
    account: Account,
    dashboard: Dashboard,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    account.start("head")
    dashboard.add("mine")
    target = there().target
    idle = f"no job is running, and the cluster is up: {COSTS}"

    monkeypatch.setattr(Cluster, "follow", lambda *given: LET_GO)
    assert commands.attach(None, target, Console(width=400)) == LET_GO
    assert idle not in capsys.readouterr().out

    def ends(*given: object) -> bool:
        dashboard.jobs[0]["status"] = "STOPPED"
        return False

    monkeypatch.setattr(commands, "end_job", ends)
    assert commands.stop(None, target, Console(width=400)) == 0
    said = capsys.readouterr().out
    assert "ended at once" in said
    assert idle in said

    monkeypatch.setattr(Cluster, "follow", lambda *given: 1)
    assert commands.attach(None, target, Console(width=400)) == 1
    assert f"{idle} " in (said := capsys.readouterr().out)
    assert "End it: python launch.py down" in said
    dashboard.add(reaper.NAME, kind="service")
    assert commands.attach(None, target, Console(width=400)) == 1
    assert "It ends by itself within 5 minutes" in capsys.readouterr().out


def test_who_does_not_follow_a_job_is_told_that_the_cluster_stays(
    there: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Cluster, "submit", lambda *given: "mine-1")
    assert errands.run(there(detach=True), ERRAND) == 0
    said = capsys.readouterr().out
    assert f"stays up: {COSTS}" in said
    assert "End it: python launch.py down" in said
    assert errands.run(there(detach=True, down_when_done=True), ERRAND) == 0
    said = capsys.readouterr().out
    assert "ends with its last job" in said
    assert "stays up" not in said


def test_status_shows_stopped_hosts_and_what_ends_them(
    there: Callable[..., Cluster],
    account: Account,
    capsys: pytest.CaptureFixture[str],
) -> None:
    account.ec2.stop_instances(InstanceIds=[account.start("head")])
    assert commands.status(there().target, Console(width=400)) == 0
    said = capsys.readouterr().out
    assert "stopped" in said
    assert "and 1 stopped, whose volumes cost" in said
    assert "End them: python launch.py down" in said
