"""What is shown of a job's log and end, what is shipped, and which interface hosts speak by."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobType
from ray.train.torch.config import _is_backend_nccl

from distssl import collectives
from distssl.on_ray import jobs, network


def test_a_log_that_comes_from_its_start_again_is_shown_once() -> None:
    log = "".join(f"line {number}\n" for number in range(50))
    draws = random.Random(0)
    shown: list[str] = []
    view = jobs._Log(shown.append)
    for _ in range(6):  # each connection gives the log anew, in other pieces, and breaks somewhere
        position, end = 0, draws.randrange(len(log))
        while position < end:
            piece = log[position : min(end, position + draws.randrange(1, 40))]
            view.add(position, piece)
            position += len(piece)
    view.add(0, log)
    assert "".join(shown) == log


def test_what_is_shipped_is_the_code_and_no_more() -> None:
    with jobs.shipment({"job.yaml": "seed: 1\n"}) as folder:
        assert {path.name for path in folder.iterdir()} == {*jobs.SHIPPED, "job.yaml"}
        assert not list(folder.rglob("*.pyc"))
        done = subprocess.run(
            [sys.executable, "launch.py", "--help"], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_workers_with_gpus_have_a_group_for_tensors_of_both_devices() -> None:
    backend = network.layout(2, {"CPU": 1, "GPU": 1})["torch_config"].backend
    assert backend == collectives.GPU_BACKEND
    assert _is_backend_nccl(backend)  # so that Ray sets what nccl needs
    assert network.layout(2, {"CPU": 1, "GPU": 0})["torch_config"].backend == "gloo"


def test_the_interface_of_an_address() -> None:
    assert network.interface_of("127.0.0.1") in dict(socket.if_nameindex()).values()
    assert network.interface_of("192.0.2.1") is None  # an address for documentation


class Head:
    """A way to a head whose one job has ended."""

    def __init__(self, **details: Any) -> None:
        self.details = JobDetails(type=JobType.SUBMISSION, entrypoint="python launch.py", **details)

    def connect(self, within_s: float) -> Head:
        return self

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "its log\n"

    def get_job_logs(self, job: str) -> str:
        return "its log\n"

    def get_job_info(self, job: str) -> JobDetails:
        return self.details


@pytest.mark.parametrize(
    ("details", "code", "reason"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0, ""),
        ({"status": "FAILED", "driver_exit_code": 2, "message": "its last lines"}, 2, ""),
        ({"status": "STOPPED"}, 130, ""),
        ({"status": "FAILED", "message": "its host died"}, 1, "failed with no exit code of its own: its host died"),
    ],
)
def test_how_a_job_ended_and_why_where_its_log_cannot_say(details: dict[str, Any], code: int, reason: str) -> None:
    shown: list[str] = []
    said: list[str] = []
    head: Any = Head(**details)
    assert jobs.follow(head, "mine-1", shown.append, said.append) == code
    assert "".join(shown) == "its log\n"
    assert said == ([f"job mine-1 {reason}"] if reason else [])
