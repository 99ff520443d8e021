"""The commands that speak with a cluster and its jobs. attach, status, logs, stop and down do without torch."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path

import yaml
from ray.job_submission import JobDetails, JobStatus
from rich.console import Console
from rich.table import Table

from distssl import settings
from distssl.errors import ConfigError, RunError
from distssl.on_ray import aws, cluster, errands, jobs, place, standing, visible
from distssl.on_ray.remote import Cluster, Errand
from distssl.on_ray.target import Target

JOB_CONFIG = "job.yaml"
STOP_S = 300  # for the checkpoint of a run that is asked to stop
for chatty in ("botocore", "ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(chatty).setLevel(logging.WARNING)


def pretrain(config_file: Path, overrides: list[str], target: Target, console: Console) -> int:
    """The main job on a cluster; the exit code."""
    from distssl import config, method

    with Cluster(target, console) as there:
        if not any(one.startswith("machine.storage=") for one in overrides):
            overrides = [*overrides, f"machine.storage={there.storage}"]
        run = config.load(config_file, overrides, method.options)
        tree = run.model_dump(mode="json")
        del tree["machine"]["cache"]  # a folder of this machine; hosts have their own
        visible.settle(there.file, tree)
        files = {JOB_CONFIG: yaml.safe_dump(tree, sort_keys=False)}
        demand = run.machine.workers or 1, f"machine.workers={run.machine.workers}"
        return errands.run(there, Errand(run.run_name, ["pretrain", "--config", JOB_CONFIG], files, run, demand))


def sweep(config_file: Path, overrides: list[str], target: Target, console: Console) -> int:
    """A sweep on a cluster; the exit code."""
    from distssl import sweep as sweeps

    with Cluster(target, console) as there:
        tree = settings.read(config_file, overrides)
        if "storage" not in tree:
            tree["storage"] = f"{there.storage}/sweeps"
        swept = sweeps.parse(tree)
        named = {f"runs[{number}]": place for number, place in enumerate(swept.runs)}
        visible.places(there.file, {"storage": swept.storage, **named, **visible.overridden(swept.overrides)})
        files = {JOB_CONFIG: yaml.safe_dump(tree, sort_keys=False)}
        command = ["sweep", "--config", JOB_CONFIG]
        return errands.run(there, Errand(f"sweep-{swept.name}", command, files, demand=swept.demand))


def other(name: str, command: list[str], demand: tuple[int, str], target: Target, console: Console) -> int:
    """Another command of launch.py on a cluster; the exit code. demand: as in `Errand`."""
    with Cluster(target, console) as there:
        if command[0] == "evaluate":
            named = {"RUN": command[1], **visible.overridden(command)}
            command = ["evaluate", visible.places(there.file, named)["RUN"], *command[2:]]
        return errands.run(there, Errand(name, command, demand=demand))


def attach(job: str | None, target: Target, console: Console) -> int:
    with Cluster(target, console) as there:
        there.find()
        chosen = str(jobs.choose(there.client, job).submission_id)
        return errands.after(there, chosen, there.follow(chosen))


def logs(job: str | None, target: Target, console: Console) -> int:
    with Cluster(target, console) as there:
        there.find()
        found = jobs.choose(there.client, job)
        console.out(there.client.get_job_logs(str(found.submission_id)), end="", highlight=False)
    return 0


def stop(job: str | None, target: Target, console: Console) -> int:
    with Cluster(target, console) as there:
        there.find()
        found = jobs.choose(there.client, job)
        if found.status in jobs.ENDED:
            raise ConfigError(f"JOB {found.submission_id}: has ended ({found.status})")
        there.say(f"asking {found.submission_id} to save a checkpoint and stop")
        saved = end_job(there, found)
        from_where = "the last checkpoint" if saved else "what it had finished or saved before"
        there.say(f"{'stopped' if saved else 'ended at once'}; the same command goes on from {from_where}")
        errands.say_idle(there)
    return 0


def end_job(there: Cluster, found: JobDetails) -> bool:
    """Ask a job to save and stop, and end one that cannot be asked or does not; whether it ended by itself."""
    job, asking = str(found.submission_id), ["python", "-m", "distssl.on_ray.ask_to_stop", jobs.name_of(found)]
    with jobs.shipment({}) as folder:
        asked = jobs.submit(there.client, "ask-to-stop", asking, folder, {place.CLUSTER: there.name}, kind="service")
    jobs.wait(there.client, asked, 60)
    has_ears = there.client.get_job_status(asked) != JobStatus.FAILED
    if has_ears and jobs.wait(there.client, job, STOP_S):
        return True
    there.client.stop_job(job)
    if not jobs.wait(there.client, job, 60):
        raise RunError(f"job {job} does not end; python launch.py down {there.options} ends everything")
    return False


def down(target: Target, console: Console) -> int:
    with Cluster(target, console) as there:
        assert there.file
        with console.status(f"taking {there.name} down"):
            cluster.down(there.file)
        there.say(f"nothing is left of {there.name}")
    return 0


def status(target: Target, console: Console) -> int:
    """Hosts and jobs."""
    with Cluster(target, console) as there:
        hosts = standing.hosts(there.file) if there.file else None
        if there.file and hosts is not None:
            console.print(_hosts(hosts))
            there.say(standing.price(there.file, hosts))
            if not any(host["state"] in aws.UP for host in hosts):
                if hosts:
                    there.say(f"End them: {there.file.ends}")
                return 0
        there.find()
        console.print(_jobs(jobs.ours(there.client)))
        errands.say_idle(there, hosts)
    return 0


def _hosts(hosts: standing.Hosts) -> Table:
    drawn = Table(title="hosts")
    for name in ("id", "type", "instance", "state", "spot"):
        drawn.add_column(name)
    for host in hosts:
        drawn.add_row(*(str(host[name]) for name in ("id", "type", "instance", "state")), "yes" if host["spot"] else "")
    return drawn


def _jobs(found: list[JobDetails]) -> Table:
    drawn = Table(title="jobs, newest first")
    for name in ("job", "state", "started", "said last"):
        drawn.add_column(name, overflow="fold")
    for job in found:
        started = datetime.datetime.fromtimestamp((job.start_time or 0) / 1000).isoformat(" ", "seconds")
        message = (job.message or "").splitlines()[:1]
        drawn.add_row(str(job.submission_id), job.status.value.lower(), started, *message)
    return drawn
