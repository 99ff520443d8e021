"""What is refused before a cluster is brought up, and on one that is up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType
from rich.console import Console

from distssl.errors import ConfigError
from distssl.on_ray import remote
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
