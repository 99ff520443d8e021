"""Brings a cluster up and takes it down, with Ray's launcher; where that fails, nothing of what it began is left."""

from __future__ import annotations

import collections
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distssl import prices
from distssl.errors import ConfigError, RunError
from distssl.on_ray import aws, head
from distssl.on_ray.cluster_file import ClusterFile

log = logging.getLogger(__name__)

UP = "create_or_update_cluster(sys.argv[1], no_restart=False, no_config_cache=True)"
DOWN = "teardown_cluster(sys.argv[1])"
LOOK = "from pathlib import Path; from distssl.on_ray import head; sys.exit(head.look(Path(sys.argv[1])))"
# What Ray says before it gives up, most telling first, and what we make of it.
REASONS = (
    (r"An error occurred \((\w+)\).*?: (.*)", "AWS answers {0}: {1}"),
    (r"SSH still not available|Failed to establish SSH|wait_ready timeout", "the head does not answer SSH"),
    (r"Head node fetch timed out", "the head did not start"),
    (r"Failed to setup head node|SSH command failed", "setting up the head failed"),
)

Hosts = list[dict[str, Any]]
Resources = Mapping[str, Mapping[str, float]]  # node type -> what a node has


def check(file: ClusterFile) -> Resources:
    """Everything that can be known without starting a host. Raises ConfigError with a line for each mistake."""
    if file.provider == "aws":
        return aws.check(file)
    if file.provider == "local":
        return {"local": _started_with(file.config.get("worker_start_ray_commands", []))}
    return {name: kind.get("resources") or {} for name, kind in file.config["available_node_types"].items()}


def is_up(file: ClusterFile) -> bool:
    """Whether there is a head, and off AWS, whether Ray answers on it.

    Raises RunError where that is not known or Ray does not: somebody's job may run there.
    """
    if file.provider == "aws":
        return any(one["state"] in ("pending", "running") for one in aws.instances(file))
    found = _look(file)
    if found in (head.ANSWERS, head.NONE):
        return found == head.ANSWERS
    said = file.folder / "look.log"
    who, what = "the head does not answer SSH", "try again"
    if found != head.UNREACHABLE:  # a cloud's answer
        who = f"whether there is a head is not known: {_reason(said.read_text())}"
    if found == head.SILENT:
        who = f"the head of {file.name} is there, and Ray does not answer"
        what = f"try again, or end it: python launch.py down --cluster {file.path}"
    raise RunError(f"{file.path}: {who}; nothing was changed, {what}. Its words: {said}")


def up(file: ClusterFile, tell: Callable[[str], None]) -> None:
    """Start the head where there is none; the workers come when a job asks for them. tell: called with Ray's lines.

    Raises RunError with one line where that fails, after taking down what was started.
    """
    if file.provider == "aws":
        aws.make_security_group(file)
    try:
        done = _sdk(file, UP, "up", tell).returncode == 0
    except BaseException:  # a Ctrl-C
        down(file, tell)
        raise
    if done:
        return
    said = file.folder / "up.log"
    reason = f"{file.path}: {_reason(said.read_text())}; "
    try:
        down(file, tell)
    except (ConfigError, RunError) as error:
        raise RunError(f"{reason}and taking it down failed too: {error}. Ray's words: {said}") from None
    raise RunError(f"{reason}nothing is left running. Ray's words: {said}")


def down(file: ClusterFile, tell: Callable[[str], None]) -> None:
    """End every host of the cluster, and on AWS its security group. Raises RunError where one is left or may be."""
    if file.provider == "aws":
        if aws.instances(file):  # or the launcher would make a security group, to end nothing
            _sdk(file, DOWN, "down", tell)
        aws.terminate(file)
        aws.remove_security_group(file)
        left = aws.instances(file)
        if left:
            raise RunError(f"{file.path}: still there: {', '.join(one['id'] for one in left)}; look at the AWS console")
        return
    code = _sdk(file, DOWN, "down", tell).returncode
    # The launcher ends hosts of one's own by a `ray stop`, and says nothing where that fails.
    if code or (file.provider == "local" and _look(file) != head.NONE):
        said = f"Ray's words: {file.folder / 'down.log'}"
        raise RunError(f"{file.path}: {file.name} may still be up: it could not be taken down. {said}")


def hosts(file: ClusterFile) -> Hosts | None:
    """Those that are up, as `aws.instances` has them; None where that is not known."""
    return aws.instances(file) if file.provider == "aws" else None


def price(file: ClusterFile, hosts: Hosts | None) -> str:
    """What hosts cost, for people; "" where that is not known."""
    if hosts is None:
        return ""
    kinds = collections.Counter(one["type"] for one in hosts)
    bill = prices.bill(file.config, kinds)
    known = (
        f"{sum(kinds.values())} hosts, about {bill.usd_per_hour:.2f} USD an hour (list prices of {prices.table().date})"
    )
    return known + (f", without {', '.join(bill.unknown)}, whose price is not known" if bill.unknown else "")


def written(file: ClusterFile) -> Path:
    """The file for Ray."""
    if file.provider == "aws":
        aws.keep_to_security_group(file)
    return file.write()


def environment(file: ClusterFile) -> dict[str, str]:
    """Of Ray's own commands on this machine."""
    ours = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    if file.provider == "local":
        ours["RAY_UP_enable_autoscaler_v2"] = "0"  # the new one knows clouds alone
    return os.environ | ours


def _look(file: ClusterFile) -> int:
    """What `head.look` finds."""
    return _sdk(file, LOOK, "look", lambda line: None).returncode


def _sdk(file: ClusterFile, call: str, name: str, tell: Callable[[str], None]) -> subprocess.CompletedProcess[bytes]:
    """A call of Ray's launcher in a process of its own, for it ends its process; its words go to a log beside the file.

    On a Ctrl-C it is ended before the interrupt goes on.
    """
    path = written(file)
    code = f"import sys; from ray.autoscaler.sdk import *; {call}"
    with (
        open(path.with_name(f"{name}.log"), "wb") as said,
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)],
            env=environment(file),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout
        try:
            for line in process.stdout:
                said.write(line)
                said.flush()
                tell(_plain(line))
        except BaseException:
            process.terminate()
            raise
    return subprocess.CompletedProcess([], process.returncode)


def _plain(line: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line.decode(errors="replace")).strip()


def _reason(said: str) -> str:
    for pattern, words in REASONS:
        found = re.search(pattern, said)
        if found:
            return words.format(*(group.strip().rstrip(".") for group in found.groups()))
    lines = [plain for line in said.splitlines() if (plain := _plain(line.encode()))]
    return lines[-1] if lines else "Ray's launcher ended without a word"


def _started_with(commands: list[str]) -> dict[str, float]:
    """What `ray start` is told that a host has; nothing where it finds out by itself."""
    found = dict(re.findall(r"--num-(cpus|gpus)[= ](\d+)", " ".join(commands)))
    return {key[:3].upper(): float(value) for key, value in found.items()}
