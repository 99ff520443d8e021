"""What is refused before a cluster is brought up, and on one that is up."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobDetails, JobStatus, JobType
from rich.console import Console

from distssl.errors import ConfigError, RunError
from distssl.on_ray import commands, errands, jobs, remote
from distssl.on_ray.place import Workers
from distssl.on_ray.remote import Cluster, Errand
from distssl.on_ray.target import Target
from tests import runs


def test_lanes_are_refused_for_a_number_of_workers_that_the_user_names_alone(tmp_path: Path) -> None:
    """Without one the job takes two of the three: the most that divide the lanes."""
    room = Workers(3, 1, 0)
    remote._check_lanes(runs.tiny(tmp_path, tmp_path, "data.lanes=4", "machine.workers=null"), room)
    with pytest.raises(ConfigError, match=r"machine.workers=3 does not divide data.lanes=4; right here: \[1, 2\]"):
        remote._check_lanes(runs.tiny(tmp_path, tmp_path, "data.lanes=4", "machine.workers=3"), room)


class Head:
    """The jobs of a cluster, which never end."""

    def __init__(self) -> None:
        self.jobs: list[JobDetails] = []

    def list_jobs(self) -> list[JobDetails]:
        return self.jobs

    def submit_job(self, submission_id: str, metadata: dict[str, str], **rest: Any) -> None:
        status, entrypoint = JobStatus.RUNNING, rest["entrypoint"]
        self.jobs.append(
            JobDetails(
                type=JobType.SUBMISSION,
                submission_id=submission_id,
                metadata=metadata,
                status=status,
                entrypoint=entrypoint,
            )
        )


def test_a_job_is_found_again_by_the_same_settings_and_refused_by_others(capsys: pytest.CaptureFixture[str]) -> None:
    there = Cluster(Target(None, "http://head"), Console())
    there.client = head = Head()  # type: ignore[assignment]
    command = ["pretrain", "--config", "job.yaml"]
    first, other = ({"job.yaml": f"seed: {seed}\n"} for seed in (1, 2))
    assert there.submit(Errand("mine", command, first), None) == "mine-1"
    assert there.submit(Errand("mine", command, first), None) == "mine-1"
    assert "job mine-1 is doing that already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"job mine-1 runs with other settings; say name=ANOTHER, or .* stop mine-1"):
        there.submit(Errand("mine", command, other), None)
    assert there.submit(Errand("another", command, other), None) == "another-1"
    assert [job.submission_id for job in head.jobs] == ["mine-1", "another-1"]


class Answers(http.server.BaseHTTPRequestHandler):
    """A dashboard with one job, which runs."""

    def do_GET(self) -> None:
        job: dict[str, object] = {
            "type": "SUBMISSION",
            "submission_id": "mine-1",
            "status": "RUNNING",
            "entrypoint": "python launch.py",
        }
        job["metadata"] = {"project": jobs.PROJECT, "kind": "work", jobs.NAME: "mine"}
        version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": "x"}
        text = json.dumps({"/api/version": version, "/api/jobs/": [job]}.get(self.path, job)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *arguments: object) -> None:
        """It says nothing."""


@pytest.fixture
def dashboard() -> Iterator[tuple[str, Callable[[], None]]]:
    """Its URL, and how to end it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def end() -> None:
        server.shutdown()
        server.server_close()

    yield f"http://127.0.0.1:{server.server_address[1]}", end
    end()


def asked(there: Cluster) -> list[Callable[[], object]]:
    """What commands ask a head that they found."""
    job = jobs.choose(there.client, "mine")
    return [
        lambda: commands.end_job(there, job),
        lambda: jobs.choose(there.client, None),
        lambda: jobs.wait(there.client, "mine-1", 5),
        lambda: there.client.get_job_logs("mine-1"),
        lambda: there.submit(Errand("mine", ["pretrain"]), None),
    ]


def test_a_head_that_stops_answering_is_told_in_a_line(dashboard: tuple[str, Callable[[], None]]) -> None:
    url, end = dashboard
    with Cluster(Target(None, url), Console()) as there:
        there.find()
        calls = asked(there)
        end()
        for call in calls:
            with pytest.raises(RunError, match=rf"^{url}: the connection is lost: [^\n]*$"):
                call()


def test_a_ctrl_c_lets_go_of_a_job_whose_head_does_not_answer(
    dashboard: tuple[str, Callable[[], None]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, end = dashboard

    def interrupted(*given: object) -> int:
        end()
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "follow", interrupted)
    monkeypatch.setattr(Cluster, "submit", lambda *given: "mine-1")
    with Cluster(Target(None, url), Console()) as there:
        assert errands.run(there, Errand("mine", ["pretrain"])) == remote.LET_GO
    assert f"Come back: python launch.py attach mine-1 --address {url}" in capsys.readouterr().out


def test_what_a_head_refuses_is_told_in_a_line(
    dashboard: tuple[str, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "do_DELETE", lambda self: self.send_error(404), raising=False)
    with Cluster(Target(None, dashboard[0]), Console()) as there:
        there.find()
        with pytest.raises(RunError, match=rf"^{dashboard[0]}: 404: [^\n]*$"):
            there.client.delete_job("gone-1")
