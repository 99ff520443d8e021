"""Brings a cluster up and takes it down, with Ray's launcher; where that fails, nothing of what it began is left."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from distssl import atomic, capacity
from distssl.capacity import Resources
from distssl.errors import ConfigError, RunError
from distssl.on_ray import aws, head, scale, standing
from distssl.on_ray.cluster_file import ClusterFile
from distssl.on_ray.head import Found

log = logging.getLogger(__name__)

# Of a cloud's head that another command began meanwhile nothing is restarted. Hosts that are always there have no head
# that is new, and the launcher's notes may be of before they were rebooted: without a restart Ray would not be started.
UP = "create_or_update_cluster(sys.argv[1], no_restart={no_restart}, no_config_cache=True)"
DOWN = "teardown_cluster(sys.argv[1])"
NOTE = "import pathlib; from distssl.on_ray import head; head.note(pathlib.Path(sys.argv[1]))"
LOOK = (
    "import dataclasses, json, pathlib; from distssl.on_ray import head; "
    "print(json.dumps(dataclasses.asdict(head.look(pathlib.Path(sys.argv[1])))))"
)
# What Ray says before it gives up, most telling first, and what we make of it.
REASONS = (
    (r"An error occurred \((\w+)\).*?: (.*)", "AWS answers {0}: {1}"),
    (r"SSH still not available|Failed to establish SSH|wait_ready timeout", "the head does not answer SSH"),
    (r"Head node fetch timed out", "the head did not start"),
    (r"Failed to setup head node|SSH command failed", "setting up the head failed"),
)
COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
NOT_OURS = "Ray runtime will not be restarted"  # what Ray says where it finds the head of another command
UP_S = 1800  # another command of this machine may take so long to bring it up
SET_UP_S = 1200  # and one of another machine to set a head up, of which only the cloud tells
POLL_S = 10

Tell = Callable[[str], object]


def check(file: ClusterFile) -> Resources:
    """Everything that can be known without starting a host. Raises ConfigError with a line for each mistake."""
    return aws.check(file) if file.provider == "aws" else capacity.listed(file.config)


def is_up(file: ClusterFile) -> bool:
    """Whether there is a head on which Ray answers.

    Raises RunError where that is not known, or hosts are there without a head that answers: they may cost, and
    somebody's job may run there.
    """
    return _usable(file, _look(file)).state == head.ANSWERS


def _usable(file: ClusterFile, found: Found | None, cut_off: bool = False) -> Found:
    """What was found, where a command can go on from there. cut_off: as for `standing.trouble`.

    Raises RunError as `is_up`.
    """
    said = file.folder / "look.log"
    if found is None:
        who = f"whether there is a head is not known: {_reason(said.read_text())}"
        raise RunError(f"{file.path}: {who}; nothing was changed, try again. Its words: {said}")
    if found.state not in (head.ANSWERS, head.NONE):
        raise RunError(f"{standing.trouble(file, found, cut_off)}. Its words: {said}")
    return found


def bring_up(file: ClusterFile, tell: Tell, say: Tell) -> bool:
    """Start the head where there is none; the workers come when a job asks for them. Whether it was this that did.

    tell: called with what is being done now, say: with what is to be read. Raises RunError as `is_up` and `up`, and
    ConfigError where the head was started with other hosts than the file has now.
    """
    atomic.make_folder(file.folder)
    taken = f"{file.path}: another command has been bringing {file.name} up for {UP_S // 60} minutes; end it, or wait"
    with atomic.held(file.folder / "up.lock", UP_S, taken):
        found = _usable(file, _set_up(file, say), _unfinished(file).exists())
        if found.state == head.ANSWERS:
            scale.require_same(file, found.started)
        else:
            up(file, tell, say)
    return found.state == head.NONE


def _set_up(file: ClusterFile, say: Tell) -> Found | None:
    """What is there, once no other machine sets its head up."""
    said, deadline = False, time.monotonic() + SET_UP_S
    while (found := _look(file)) is not None and found.state == head.SETTING_UP:
        if _unfinished(file).exists() or time.monotonic() > deadline:
            break
        if not said:
            say(
                f"the head of {file.name} is being set up ({found.status}), by another command or by one that was cut "
                f"off: waiting for it, at most {SET_UP_S // 60} minutes. To end it: {file.ends}"
            )
            said = True
        time.sleep(POLL_S)
    return found


def _unfinished(file: ClusterFile) -> Path:
    """A file that is there while a command of this machine brings the cluster up, and where one was cut off at that."""
    return file.folder / "unfinished"


def up(file: ClusterFile, tell: Tell, say: Tell) -> None:
    """Start a head. Use `bring_up`, which looks whether there is one.

    Raises RunError with one line where that fails, after taking down what was started.
    """
    before = set()
    if file.provider == "aws":
        before = aws.up(file)
        aws.make_security_group(file)
    scale.keep(file)
    _unfinished(file).touch()
    said = file.folder / "up.log"
    said.write_bytes(b"")
    call = UP.format(no_restart=file.provider != "local")
    try:
        done = _sdk(file, call, "up", lambda line: tell(f"bringing {file.name} up: {line}")).returncode == 0
    except BaseException:  # a Ctrl-C
        _undo(file, before, said.read_text(), say)
        raise
    if not done:
        reason = f"{file.path}: {_reason(said.read_text())}; "
        try:
            left = _undo(file, before, said.read_text(), say)
        except (ConfigError, RunError) as error:
            raise RunError(f"{reason}and taking it down failed too: {error}. Ray's words: {said}") from None
        raise RunError(f"{reason}{left}. Ray's words: {said}")
    _unfinished(file).unlink(missing_ok=True)


def _undo(file: ClusterFile, before: set[str], said: str, say: Tell) -> str:
    """End what a start that failed has begun, and nothing else; what is left, for people.

    before: the ids of instances that ran before it began. said: the launcher's words.
    """
    left = "nothing is left running"
    if NOT_OURS in said:
        left = "the head is another command's and was left alone"
    else:
        say(f"taking {file.name} down")
        try:
            if file.provider == "aws":
                while ours := aws.up(file) - before:
                    aws.terminate(file, sorted(ours))
                if not aws.instances(file):
                    aws.remove_security_group(file)
            else:
                down(file)
        except KeyboardInterrupt:
            say(f"hosts of {file.name} may be left. End them: {file.ends}")
            raise
    _unfinished(file).unlink(missing_ok=True)
    return left


def down(file: ClusterFile) -> None:
    """End every host of the cluster, and on AWS its security group. Raises RunError where one is left or may be."""
    if file.provider == "aws":
        if aws.up(file):  # or the launcher would make a security group, to end nothing
            _sdk(file, DOWN, "down")
        aws.terminate(file, [one["id"] for one in aws.instances(file)])
        aws.remove_security_group(file)
        left = aws.instances(file)
        if left:
            raise RunError(f"{file.path}: still there: {', '.join(one['id'] for one in left)}; look at the AWS console")
    else:
        call = f"{NOTE}; {DOWN}" if file.provider == "local" else DOWN  # it ends the heads alone that it knows of
        code = _sdk(file, call, "down").returncode
        # The launcher ends hosts of one's own by a `ray stop`, and says nothing where that fails.
        if code or (file.provider == "local" and not _is_gone(file)):
            said = f"Ray's words: {file.folder / 'down.log'}"
            raise RunError(f"{file.path}: {file.name} may still be up: it could not be taken down. {said}")
    _unfinished(file).unlink(missing_ok=True)


def _is_gone(file: ClusterFile) -> bool:
    found = _look(file)
    return found is not None and found.state == head.NONE


def written(file: ClusterFile) -> Path:
    """The file for Ray."""
    if file.provider == "aws":
        aws.keep_to_security_group(file)
    atomic.make_folder(file.folder)
    with atomic.locked(file.folder):
        return file.write()


def environment(file: ClusterFile) -> dict[str, str]:
    """Of Ray's own commands on this machine."""
    ours = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    if file.provider == "local":
        ours["RAY_UP_enable_autoscaler_v2"] = "0"  # the new one knows clouds alone
    return os.environ | ours


def _look(file: ClusterFile) -> Found | None:
    """What `head.look` finds; None where it cannot."""
    lines: list[str] = []
    done = _sdk(file, LOOK, "look", lines.append)
    return None if done.returncode else Found(**json.loads(lines[-1]))


def _sdk(file: ClusterFile, call: str, name: str, tell: Tell = str) -> subprocess.CompletedProcess[bytes]:
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
    return COLOUR.sub("", line.decode(errors="replace")).strip()


def _reason(said: str) -> str:
    said = COLOUR.sub("", said)
    for pattern, words in REASONS:
        found = re.search(pattern, said)
        if found:
            return words.format(*(group.strip().rstrip(".") for group in found.groups()))
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "Ray's launcher ended without a word"
