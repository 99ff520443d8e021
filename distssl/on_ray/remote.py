"""A cluster that a command speaks with: check, bring it up, ship the code, submit, follow."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ray.job_submission import JobSubmissionClient
from rich import markup
from rich.console import Console

from distssl.config import Run
from distssl.data import order
from distssl.errors import ConfigError
from distssl.on_ray import cluster, jobs, place, reaper, token
from distssl.on_ray.cluster_file import ClusterFile
from distssl.on_ray.place import Workers
from distssl.on_ray.target import Target
from distssl.on_ray.tunnel import TENSORBOARD, Way

log = logging.getLogger(__name__)

BOARD = "tensorboard"  # the service's name
LET_GO = 130  # the exit code of a command whose job goes on
OF_JOBS = {
    "RAY_SCHEDULER_EVENTS": "0",  # or Ray says every 5 s that it adds a host where there is none to be had
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # Train's runs in the dashboard's interface, for an actor of its own
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1200",  # hosts have to be found, started and set up first
    "AWS_METADATA_SERVICE_TIMEOUT": "5",  # by default one try of a second decides that a host has no role
    "AWS_METADATA_SERVICE_NUM_ATTEMPTS": "5",
}
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_REGION")  # no keys: hosts have roles of their own


@dataclass(frozen=True)
class Errand:
    """What to do there. command: of launch.py, without the options of a Target; files: by name, beside launch.py.

    run: whose sizes have to fit the workers, and whose folder TensorBoard shows. demand: workers, and what asks for
    them.
    """

    name: str
    command: list[str]
    files: Mapping[str, str] = field(default_factory=dict)
    run: Run | None = None
    demand: tuple[int, str] = (1, "")


class Cluster:
    """A cluster that commands speak with, by its file or its address. Use as a context manager."""

    def __init__(self, target: Target, console: Console) -> None:
        self.target, self.console = target, console
        self.file = ClusterFile(target.cluster) if target.cluster else None
        self.way = Way(self.file, target.address)
        self.client: JobSubmissionClient
        self.raised: bool | None = None  # whether this command brought it up; None: it is not known to be up

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.way.close()

    @property
    def name(self) -> str:
        return self.file.name if self.file else self.way.dashboard

    @property
    def options(self) -> str:
        """Of the command line, to speak with it again."""
        return f"--cluster {self.target.cluster}" if self.file else f"--address {self.target.address}"

    @property
    def storage(self) -> str:
        """Where its jobs' run folders lie. Raises ConfigError where nobody said."""
        found = self.file.options.storage if self.file else None
        if found is None:
            raise ConfigError("--storage: hosts share no folder with this machine; say --storage s3://BUCKET/runs")
        return found

    @property
    def is_connected(self) -> bool:
        """Whether it has answered this command."""
        return hasattr(self, "client")

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)

    def find(self) -> None:
        """Connect to it. Raises ConfigError where it is not up."""
        if self.file and not cluster.is_up(self.file):
            raise ConfigError(f"{self.target.cluster}: the cluster {self.name} is not up")
        self.client = self.way.connect()

    def raise_up(self, errand: Errand) -> Workers | None:
        """Check, bring it up where it is not, connect; what it has room for, None where only the cluster knows.

        A head that is there is used as it is: nothing of it is restarted.
        """
        workers = None
        if self.file:
            self.say(f"checking {self.target.cluster}")
            kept_cpus = (errand.run.machine.eval_cpus or 0) if errand.run else 0
            workers = self.file.workers(cluster.check(self.file), kept_cpus)
            workers.require(*errand.demand)
            if errand.run:
                _check_lanes(errand.run, workers)
            self._bring_up(self.file)
        self.client = self.way.connect()
        return workers

    def _bring_up(self, file: ClusterFile) -> None:
        started = time.monotonic()
        with self.console.status(f"looking for {self.name}") as status:
            self.raised = cluster.bring_up(file, lambda text: status.update(markup.escape(text[:120])), self.say)
        if self.raised:
            self.say(f"cluster {self.name} is up after {time.monotonic() - started:.0f} s")

    def submit(self, errand: Errand, workers: Workers | None) -> str:
        """Start the errand's job; the one that is doing it already where there is one. Its id.

        Raises ConfigError where that one does it with other settings.
        """
        doing = self._doing(errand)
        environment = {**place.ENVIRONMENT, **OF_JOBS, place.CLUSTER: self.name}
        environment |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        if self.file:
            environment |= self.file.options.environment
            if self.file.options.storage:
                environment[place.STORAGE] = self.file.options.storage
        if workers:
            environment[place.WORKERS] = workers.dumps()
        with jobs.shipment(errand.files) as folder:
            if self.target.down_when_done:  # first, so that no job is without it
                self._serve(reaper.NAME, ["python", "-m", "distssl.on_ray.reaper"], folder, environment)
            if doing:
                self.say(f"job {doing} is doing that already")
                return doing
            command = ["python", "launch.py", *errand.command]
            job = jobs.submit(self.client, errand.name, command, folder, environment, errand.files)
            if errand.run and self.file:
                where = ("--logdir", str(errand.run.machine.storage), "--host", "127.0.0.1", "--port", str(TENSORBOARD))
                self._serve(BOARD, ["tensorboard", *where], folder, environment)
        return job

    def _doing(self, errand: Errand) -> str | None:
        """The job that does the errand already; None where there is none."""
        for running in jobs.running(self.client, errand.name):
            if jobs.command_of(running) != errand.command:
                continue  # another evaluation of the same run
            job = str(running.submission_id)
            if not jobs.has_files(running, errand.files):
                end = f"python launch.py stop {job} {self.options}"
                raise ConfigError(f"name: job {job} runs with other settings; say name=ANOTHER, or end it first: {end}")
            return job
        return None

    def _serve(self, name: str, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        """Have a service run on the head, once, and in place of one of its name that does something else."""
        for running in jobs.running(self.client, name, "service"):
            if running.entrypoint == shlex.join(command):
                return
            self.client.stop_job(str(running.submission_id))
            jobs.wait(self.client, str(running.submission_id), 60)
        jobs.submit(self.client, name, command, folder, environment, kind="service")

    def follow(self, job: str) -> int:
        """Show the job until it ends; its exit code. A Ctrl-C lets go of it."""
        self.say(f"job {job} on {self.name}")
        self.say(f"dashboard:   {self.way.dashboard}")
        self.say(f"its token:   cat {token.FILE}")
        try:
            if self.way.tensorboard and jobs.running(self.client, BOARD, "service"):
                self.say(f"TensorBoard: {self.way.tensorboard}")
            return jobs.follow(self.way, job, lambda text: self.console.out(text, end="", highlight=False), self.say)
        except KeyboardInterrupt:
            self.say(f"\nlet go of {job}, which goes on. Come back: python launch.py attach {job} {self.options}")
            return LET_GO


def _check_lanes(run: Run, workers: Workers) -> None:
    """Where the user says how many workers, the lanes must be shared out to them evenly. Raises ConfigError."""
    num, lanes = run.machine.workers, order.lanes_of(run)
    if num and lanes % num:
        fits = [one for one in range(1, workers.most + 1) if lanes % one == 0]
        raise ConfigError(f"machine.workers={num} does not divide data.lanes={lanes}; right here: {fits}")
