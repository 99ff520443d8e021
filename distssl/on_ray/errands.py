"""The same command on a cluster, which leaves as its job leaves, and leaves nothing that costs without a word."""

from __future__ import annotations

from ray.job_submission import JobDetails

from distssl.errors import ConfigError, RunError
from distssl.on_ray import cluster, jobs, reaper, standing
from distssl.on_ray.remote import LET_GO, Cluster, Errand
from distssl.on_ray.standing import Hosts


def run(there: Cluster, errand: Errand) -> int:
    """Do an errand there; the exit code."""
    job = None
    try:
        job = there.submit(errand, there.raise_up(errand))
        if there.target.detach:
            there.say(f"job {job} goes on by itself. Watch it: python launch.py attach {job} {there.options}")
            _say_that_it_stays(there, job)
            return 0
        code = there.follow(job)
    except BaseException:  # a Ctrl-C too: nobody watches any more what costs
        _leave(there, job)
        raise
    return after(there, job, code)


def after(there: Cluster, job: str, code: int) -> int:
    """What becomes of the cluster after a job that was followed; the exit code, which is the job's.

    Raises RunError or ConfigError where the cluster is to end and does not.
    """
    if there.file and (code != LET_GO or _has_ended(there, job)):
        if there.target.down_when_done:
            _end_without_jobs(there)
        else:
            say_idle(there)
    return code


def say_idle(there: Cluster, hosts: Hosts | None = None) -> None:
    """That hosts are up without work, and what that costs. hosts: those that there are, if it is known."""
    if there.file is None:
        return
    try:
        if jobs.running(there.client):
            return
        ends_itself = bool(jobs.running(there.client, reaper.NAME, "service"))
    except RunError as error:
        there.say(f"whether {there.name} still has a job is not known: {error}. End it: {there.file.ends}")
        return
    end = f"It ends by itself within {reaper.GRACE_S // 60} minutes" if ends_itself else f"End it: {there.file.ends}"
    there.say(f"no job is running, and the cluster is up{_costs(there, hosts)}. {end}", style="yellow")


def _leave(there: Cluster, job: str | None) -> None:
    """After an error: end a cluster that was to end with its job and has none, else say that it is up.

    job: the one that was submitted; None: there is none yet.
    """
    if there.file is None or there.raised is None:
        return
    others = _at_work(there)
    if others:
        there.say(f"job {others[0].submission_id} is running on {there.name}")
    elif job or not there.target.down_when_done or (others is None and not there.raised):
        _say_that_it_stays(there, job)
    else:
        try:
            _end(there)
        except (ConfigError, RunError) as error:  # beside the one that is raised
            there.say(str(error))
        except KeyboardInterrupt:
            there.say(f"hosts of {there.name} may be left. End them: {there.file.ends}")
            raise


def _at_work(there: Cluster) -> list[JobDetails] | None:
    """Jobs that run on it; None where that is not known."""
    try:
        return jobs.at_work(there.client) if there.is_connected else None
    except RunError:
        return None


def _has_ended(there: Cluster, job: str) -> bool:
    """Where nobody answers, it goes on."""
    try:
        return jobs.wait(there.client, job, 0)
    except RunError:
        return False


def _end_without_jobs(there: Cluster) -> None:
    """Take it down, unless somebody else's job runs on it."""
    others = _at_work(there)
    if others is None:
        there.say(f"whether {there.name} has another job is not known; it ends when no job is left")
    elif others:
        there.say(f"job {others[0].submission_id} is running on {there.name}, which ends when no job is left")
    else:
        _end(there)


def _end(there: Cluster) -> None:
    assert there.file
    there.say(f"taking {there.name} down")
    cluster.down(there.file)
    there.say("nothing of it is left")


def _say_that_it_stays(there: Cluster, job: str | None) -> None:
    """What it costs from now on, and how to end it."""
    if there.file is None:
        return
    if job and there.target.down_when_done:
        there.say(f"{there.name} ends with its last job")
    else:
        there.say(f"{there.name} stays up{_costs(there)}. End it: {there.file.ends}")


def _costs(there: Cluster, hosts: Hosts | None = None) -> str:
    """The end of a line. hosts: those that there are, if it is known."""
    assert there.file
    try:
        costs = standing.price(there.file, standing.hosts(there.file) if hosts is None else hosts)
    except ConfigError as error:
        costs = f"what it costs is not known: {error}"
    return f": {costs}" if costs else ""
