"""Brings a cluster up and takes it down, with Ray's launcher; nothing is left running where that fails."""

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
from distssl.errors import RunError
from distssl.on_ray import aws
from distssl.on_ray.cluster_file import ClusterFile

log = logging.getLogger(__name__)

UP = "create_or_update_cluster(sys.argv[1], no_restart=False, no_config_cache=True)"
DOWN = "teardown_cluster(sys.argv[1])"
# Whether there is a head and Ray answers on it: what the launcher remembers may be of before the host was rebooted.
HEALTH = "run_on_cluster(sys.argv[1], cmd='RAY_AUTH_MODE=token ray health-check')"
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
    """Whether there is a head, and on hosts that are always there, whether Ray is."""
    if file.provider == "aws":
        return any(one["state"] in ("pending", "running") for one in aws.instances(file))
    return _sdk(file, HEALTH, "health", lambda line: None).returncode == 0


def up(file: ClusterFile, tell: Callable[[str], None]) -> None:
    """Start the head; the workers come when a job asks for them. tell: called with Ray's lines.

    Raises RunError with one line where that fails, after taking down what was started.
    """
    if file.provider == "aws":
        aws.make_security_group(file)
    done = False
    try:
        done = _sdk(file, UP, "up", tell).returncode == 0
    finally:
        if not done:  # a Ctrl-C too
            down(file, tell)
    if not done:
        said = (file.folder / "up.log").read_text()
        raise RunError(f"{file.path}: {_reason(said)}; nothing is left running. Ray's words: {file.folder / 'up.log'}")


def down(file: ClusterFile, tell: Callable[[str], None]) -> None:
    """End every host of the cluster, and on AWS its security group. Raises RunError where one is left."""
    if file.provider != "aws" or aws.instances(file):  # or the launcher would make a security group, to end nothing
        _sdk(file, DOWN, "down", tell)
    if file.provider == "aws":
        aws.terminate(file)
        aws.remove_security_group(file)
        left = aws.instances(file)
        if left:
            raise RunError(f"{file.path}: still there: {', '.join(one['id'] for one in left)}; look at the AWS console")


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
