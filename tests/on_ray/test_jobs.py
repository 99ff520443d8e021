"""What is shown of a job's log and end, what is shipped, and which interface hosts speak by."""

from __future__ import annotations

import gc
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from ray.train.torch.config import _is_backend_nccl

from distssl import collectives
from distssl.errors import RunError
from distssl.on_ray import jobs, network, tunnel
from distssl.on_ray.tunnel import Way
from tests.on_ray.job_server import JOB, JobServer

# Of Ray's client, which leaves a log's connection to the collector.
pytestmark = pytest.mark.filterwarnings("ignore:ssl=None is deprecated", "ignore:Unclosed connection:ResourceWarning")


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


class Followed:
    """`jobs.follow` of the server's job, in a thread: what it has shown and said so far, and how it ended."""

    def __init__(self, server: JobServer) -> None:
        self.shown, self.said = "", ""
        self._code: Future[int] = Future()
        threading.Thread(target=self._follow, args=(server.url,), daemon=True).start()

    def _follow(self, url: str) -> None:
        try:
            self._code.set_result(jobs.follow(Way(None, url), JOB, self._show, self._say))
        except RunError as error:
            self._code.set_exception(error)

    def _show(self, text: str) -> None:
        self.shown += text

    def _say(self, text: str) -> None:
        self.said += f"{text}\n"

    def until(self, condition: Callable[[], bool], within_s: float = 20) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert not self._code.done(), (
                f"ended: {self._code.exception()!r}; it said {self.said} and showed {self.shown}"
            )
            assert time.monotonic() < deadline, f"it said {self.said} and showed {self.shown}"
            time.sleep(0.02)

    def end(self, within_s: float = 20) -> int:
        return self._code.result(within_s)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module, name, value in ((jobs, "POLL_S", 0.05), (jobs, "STATUS_S", 0.2), (tunnel, "TRY_S", 0.05)):
        monkeypatch.setattr(module, name, value)
    yield
    gc.collect()  # here, where the warning is expected


def test_a_job_is_followed_to_its_end(server: JobServer) -> None:
    server.say(b"one\n")
    followed = Followed(server)
    followed.until(lambda: followed.shown == "one\n")
    server.say("twó\n".encode())
    followed.until(lambda: followed.shown == "one\ntwó\n")
    server.say(b"its end")
    server.end_job(status="SUCCEEDED", driver_exit_code=0)
    assert followed.end() == 0
    assert (followed.shown, followed.said) == ("one\ntwó\nits end", "")


LAST_LINES = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):"
GCS = b"Failed to connect to GCS within 60 seconds"


@pytest.mark.parametrize(
    ("log", "details", "code", "why"),
    [
        (b"step 1\n", {"status": "STOPPED"}, 130, None),
        (b"error: no images\n", {"status": "FAILED", "driver_exit_code": 2}, 2, None),
        (b"step 1\nerror: a full disk\nat exit\n", {"status": "FAILED", "driver_exit_code": 1}, 1, None),
        (b"no error: yet\n" + GCS, {"status": "FAILED", "driver_exit_code": 1}, 1, LAST_LINES.format(1)),
        (b"error: of before\n" + 999 * b"step\n", {"status": "FAILED", "driver_exit_code": 1}, 1, LAST_LINES.format(1)),
        (b"step 1\n", {"status": "FAILED", "driver_exit_code": 137}, 137, LAST_LINES.format(137)),
        (b"step 1\n", {"status": "FAILED"}, 1, "Job supervisor actor died: out of memory"),
    ],
    ids=["stopped", "wrong input", "failed", "ended by Ray", "ended by Ray much later", "killed", "host lost"],
)
def test_how_a_job_ended_and_why_where_its_log_does_not_say(
    server: JobServer, log: bytes, details: dict[str, Any], code: int, why: str | None
) -> None:
    server.say(log)
    server.end_job(message=why or "said in its log", **details)
    followed = Followed(server)
    assert followed.end() == code
    assert followed.shown == log.decode()
    assert followed.said == (f"job {JOB} failed: {why}\n" if why else "")


def test_each_outage_has_a_time_of_its_own(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOST_S", 2)
    followed = Followed(server)
    for number in (1, 2):
        server.say(f"before outage {number}\n".encode())
        followed.until(lambda: f"before outage {number}\n" in followed.shown)  # noqa: B023
        server.cut(for_s=0.5)
        followed.until(lambda: followed.said.count("connecting again") == number)  # noqa: B023
        back = time.monotonic() + 3  # longer than an outage may take
        followed.until(lambda: time.monotonic() > back)  # noqa: B023
    server.end_job(status="SUCCEEDED", driver_exit_code=0)
    assert followed.end() == 0
    assert followed.shown == "before outage 1\nbefore outage 2\n"


def test_how_a_job_ended_during_an_outage_is_told_after_it(server: JobServer) -> None:
    server.say(b"one\n")
    followed = Followed(server)
    followed.until(lambda: followed.shown == "one\n")
    server.cut(for_s=1)
    server.say(b"error: a full disk\n")
    server.end_job(status="FAILED", driver_exit_code=1)
    assert followed.end() == 1
    assert followed.shown == "one\nerror: a full disk\n"
    assert "connecting again" in followed.said


def test_a_head_that_stays_away_ends_it(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "LOST_S", 1)
    followed = Followed(server)
    followed.until(lambda: server.tails == 1)
    server.cut(for_s=600)
    with pytest.raises(RunError, match=r"the head has not answered for .* minutes"):
        followed.end(30)


def test_another_head_at_its_place_is_not_asked_for_the_job(server: JobServer) -> None:
    followed = Followed(server)
    followed.until(lambda: server.tails == 1)
    server.session = "session_2"
    server.cut(for_s=0.2)
    with pytest.raises(RunError, match=f"job {JOB} is gone: the cluster's head is not the one"):
        followed.end()


def test_a_connection_that_is_dead_without_a_word_is_noticed(
    server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "REQUEST_S", 0.5)
    followed = Followed(server)
    followed.until(lambda: server.tails == 1)
    server.mute = "all"
    followed.until(lambda: "the connection is lost" in followed.said)
    server.say(b"said meanwhile\n")
    server.mute = None
    followed.until(lambda: "said meanwhile\n" in followed.shown)
    server.end_job(status="FAILED", driver_exit_code=2)
    assert followed.end() == 2


def test_a_log_whose_connection_alone_is_dead_is_asked_for_again(
    server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "QUIET_S", 2)  # Ray's tail needs one for a line
    followed = Followed(server)
    server.say(b"one\n")
    followed.until(lambda: followed.shown == "one\n")
    server.mute = "log"
    server.say(b"two\n")
    followed.until(lambda: followed.shown == "one\ntwo\n")
    server.mute = None
    server.end_job(status="SUCCEEDED", driver_exit_code=0)
    assert followed.end() == 0
    assert followed.said == ""


def test_a_log_that_is_not_utf_8_does_not_hide_how_the_job_ended(server: JobServer) -> None:
    server.say(b"one\n")
    followed = Followed(server)
    followed.until(lambda: followed.shown == "one\n")
    server.say(b"\xff\n")
    followed.until(lambda: server.tails > 2)
    assert followed.said == f"job {JOB} goes on, but no more of its log can be read for now\n"
    server.end_job(status="FAILED", driver_exit_code=2)
    assert followed.end() == 2
    assert re.search(f"warning: job {JOB} has ended, .* cannot be read: .* can't decode byte 0xff", followed.said)
    assert followed.shown == "one\n"


def test_a_ctrl_c_ends_the_following_at_once(server: JobServer) -> None:
    """Also while nobody answers. In a process of its own, as it is for the main thread."""
    program = """
import signal, sys
from distssl.on_ray import jobs, tunnel
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background, it is ignored
jobs.follow(tunnel.Way(None, sys.argv[1]), sys.argv[2], print, print)
"""
    done: list[tuple[float, str]] = []
    for mute in (None, "all"):
        server.mute, tails = None, server.tails
        command = [sys.executable, "-c", program, server.url, JOB]
        with subprocess.Popen(command, cwd=jobs.ROOT, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 60
            while server.tails == tails and time.monotonic() < deadline:
                time.sleep(0.05)
            server.mute = mute
            time.sleep(jobs.STATUS_S if mute is None else 6)  # it asks for the status every five seconds
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            try:
                words = process.communicate(timeout=60)[1]
            finally:
                process.kill()
            done.append((time.monotonic() - started, words))
    for took_s, words in done:
        assert took_s < 10
        assert words.rstrip().endswith("KeyboardInterrupt"), words
        assert "never retrieved" not in words
        assert "destroyed" not in words
