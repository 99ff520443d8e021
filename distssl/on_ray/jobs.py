"""Jobs of a cluster: what is submitted, followed through lost connections, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from distssl.errors import ConfigError, RunError, first_line
from distssl.on_ray.tunnel import Client, Way

ROOT = Path(__file__).parent.parent.parent
SHIPPED = ("launch.py", "pyproject.toml", "distssl", "configs")
PROJECT = "distssl"  # of our jobs, in their metadata
NAME = "job_name"  # where the dashboard looks for it
FILES = "files"  # a digest of those that it was submitted with
LOST_S = 600  # a head that does not answer for so long is gone
QUIET_S = 300  # a log without a new line for so long is asked for again: its connection may be dead without a word
STATUS_S = 5.0
POLL_S = 1.0
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
OURS = (2, 130)  # exit codes by which a job ends itself, after a word in its log; and 1, by which others end it too
END = 4000  # characters
LOST = (RuntimeError, OSError, aiohttp.ClientError, asyncio.TimeoutError)

Tell = Callable[[str], None]


@contextlib.contextmanager
def shipment(files: Mapping[str, str]) -> Iterator[Path]:
    """A folder with the code and with files by name and content: what a job's hosts get, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="distssl-job-") as folder:
        for name in SHIPPED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, Path(folder) / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            elif source.exists():
                shutil.copy(source, folder)
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        yield Path(folder)


def ours(client: JobSubmissionClient, kind: str = "work") -> list[JobDetails]:
    """Jobs that were submitted by us, newest first. kind: "work", or "service" for what runs beside."""
    wanted = {"project": PROJECT, "kind": kind}.items()
    found = [job for job in client.list_jobs() if job.submission_id and wanted <= (job.metadata or {}).items()]
    return sorted(found, key=lambda job: job.start_time or 0, reverse=True)


def running(client: JobSubmissionClient, name: str | None = None, kind: str = "work") -> list[JobDetails]:
    """Those of a name, by default of any."""
    return [job for job in ours(client, kind) if job.status not in ENDED and name in (None, name_of(job))]


def at_work(client: JobSubmissionClient) -> list[JobDetails]:
    """Jobs that run, whoever submitted them, but for services."""
    found = (job for job in client.list_jobs() if job.submission_id and job.status not in ENDED)
    return [job for job in found if (job.metadata or {}).get("kind") != "service"]


def name_of(job: JobDetails) -> str:
    """As it was submitted under; its id has a number too."""
    return (job.metadata or {}).get(NAME, "")


def command_of(job: JobDetails) -> list[str]:
    """Of launch.py, as it was submitted."""
    return json.loads((job.metadata or {}).get("command", "[]"))[2:]


def has_files(job: JobDetails, files: Mapping[str, str]) -> bool:
    """Whether a job was submitted with just these, by name and content."""
    return (job.metadata or {}).get(FILES) == _digest(files)


def _digest(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def submit(
    client: JobSubmissionClient,
    name: str,
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    files: Mapping[str, str] | None = None,
    kind: str = "work",
) -> str:
    """Start a job on the head; its id: the name with the first number that is free.

    folder: the `shipment` of `files`.
    """
    taken = {job.submission_id for job in client.list_jobs()}
    job = next(one for number in range(1, len(taken) + 2) if (one := f"{name}-{number}") not in taken)
    client.submit_job(
        entrypoint=shlex.join(command),
        submission_id=job,
        runtime_env={"working_dir": str(folder), "env_vars": dict(environment)},
        metadata={
            "project": PROJECT,
            "kind": kind,
            NAME: name,
            "command": json.dumps(list(command)),
            FILES: _digest(files or {}),
        },
    )
    return job


def choose(client: JobSubmissionClient, wanted: str | None) -> JobDetails:
    """The job of that id or run; without one the newest. Raises ConfigError with those there are."""
    found = ours(client)
    for job in found:
        if wanted in (None, job.submission_id, name_of(job)):
            return job
    there = ", ".join(str(job.submission_id) for job in found) or "none yet"
    raise ConfigError(f"JOB {wanted or ''}: no such job on this cluster; there are: {there}")


def follow(way: Way, job: str, show: Tell, say: Tell) -> int:
    """Show a job's log until it ends, through lost connections; the job's exit code.

    show: called with pieces of the log, say: with lines about the connection and the end. Raises RunError where the
    head stays away, or another one has come.
    """
    log, client = _Log(show), way.connect()
    session, dashboard = client.session, way.dashboard
    while True:
        try:
            details = _until_ended(client, job, log, say)
            break
        except LOST as error:
            say(f"the connection is lost ({first_line(error)}); the job goes on, connecting again")
        client = _again(way, job, session)
        if way.dashboard != dashboard:
            dashboard = way.dashboard
            say(f"connected again; the dashboard is at {dashboard} now")
    try:
        log.add(0, client.get_job_logs(job))
    except LOST as error:
        say(f"warning: job {job} has ended, and the rest of its log cannot be read: {first_line(error)}")
    if details.status == JobStatus.FAILED and not log.says_why(details.driver_exit_code):
        say(f"job {job} failed: {details.message}")
    return _exit_code(details)


def _until_ended(client: Client, job: str, log: _Log, say: Tell) -> JobDetails:
    """Show a job's log as it grows, until it has ended; how. Raises one of LOST where the head does not answer.

    The log's connection cannot tell: it has no heartbeat, and it ends before the job where the log is not UTF-8.
    """
    told = False
    with _a_loop() as loop:
        tail = loop.create_task(log.tail(client, job))
        while (details := client.get_job_info(job)).status not in ENDED:
            if tail.done():
                if not told and not tail.result():
                    say(f"job {job} goes on, but no more of its log can be read for now")
                    told = True
                time.sleep(STATUS_S)
                tail = loop.create_task(log.tail(client, job))
            loop.run_until_complete(asyncio.wait([tail], timeout=STATUS_S))
        return details


@contextlib.contextmanager
def _a_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Its tasks end with the block. Unlike in `asyncio.run`, a Ctrl-C is raised at once, whatever is waited for."""
    loop = asyncio.new_event_loop()
    try:
        yield loop
    finally:
        loop.set_exception_handler(lambda *_: None)  # a Ctrl-C that came while a task ran is raised already
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _again(way: Way, job: str, session: str | None) -> Client:
    """After an outage: a client that has an answer about the job. Raises RunError where there will be none."""
    deadline = time.monotonic() + LOST_S
    while True:
        time.sleep(POLL_S)
        try:
            client = way.connect(within_s=POLL_S)
            if client.session != session:
                break
            client.get_job_info(job)
            return client
        except LOST as error:
            if time.monotonic() > deadline:
                away = f"the head has not answered for {LOST_S // 60} minutes; is it still there?"
                raise RunError(f"{away} ({first_line(error)})") from None
    raise RunError(f"job {job} is gone: the cluster's head is not the one that it was submitted to")


def wait(client: JobSubmissionClient, job: str, within_s: float) -> bool:
    """Until a job has ended; whether it did in time."""
    deadline = time.monotonic() + within_s
    while client.get_job_status(job) not in ENDED:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


class _Log:
    """How much of a job's log was shown: it comes from its start again after each lost connection."""

    def __init__(self, show: Tell) -> None:
        self.show, self.shown, self.end = show, 0, ""

    async def tail(self, client: JobSubmissionClient, job: str) -> bool:
        """To the end of the log or of its connection; whether something new came, or it was only quiet."""
        before, position = self.shown, 0
        pieces = client.tail_job_logs(job)
        try:
            while (piece := await asyncio.wait_for(anext(pieces, None), QUIET_S)) is not None:
                self.add(position, piece)
                position += len(piece)
        except asyncio.TimeoutError:
            return True
        except LOST:
            pass
        return self.shown > before

    def add(self, position: int, piece: str) -> None:
        """Show what is new of a piece of the log."""
        new = piece[max(0, self.shown - position) :]
        if new:
            self.show(new)
            self.shown = position + len(piece)
            self.end = (self.end + new)[-END:]

    def says_why(self, exit_code: int | None) -> bool:
        """Whether a job that failed has said itself why; else Ray knows."""
        return exit_code in OURS or (exit_code == 1 and re.search("^error:", self.end, re.MULTILINE) is not None)


def _exit_code(details: JobDetails) -> int:
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return 130
    return details.driver_exit_code or 1
