"""What there is of a cluster is said before anything is done to it, and what a start began ends with it."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from distssl.errors import RunError
from distssl.on_ray import aws, cluster, head
from distssl.on_ray.cluster_file import ClusterFile
from distssl.on_ray.head import Found
from tests.cluster.test_files import ROOT, filled
from tests.on_ray.account import Account


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterFile:
    """Of a cloud that this user has no way to."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(filled(yaml.safe_load((ROOT / "cluster/gcp.yaml").read_text()))))
    return ClusterFile(path)


def test_a_cloud_that_does_not_say_whether_there_is_a_head_starts_none(file: ClusterFile) -> None:
    with pytest.raises(RunError, match=r"whether there is a head is not known: \w+.*; nothing was changed, try again"):
        cluster.is_up(file)


def test_down_that_fails_does_not_say_that_nothing_is_left(file: ClusterFile) -> None:
    with pytest.raises(RunError, match=r"may still be up: it could not be taken down. Ray's words: .*down.log"):
        cluster.down(file)


def quietly(text: str) -> None:
    """Where nobody reads."""


def test_hosts_without_a_head_that_answers_are_told_with_what_they_cost_and_how_to_end_them(account: Account) -> None:
    file = account.file()
    ends = re.escape(f": python launch.py down --cluster {file.path}. ")
    assert not cluster.is_up(file)
    account.start("worker")
    for ask in (lambda: cluster.is_up(file), lambda: cluster.bring_up(file, quietly, quietly)):
        with pytest.raises(RunError, match=rf"without a head \(1 host, about 1\.01 USD an hour .*end them{ends}"):
            ask()
    account.start("head")
    with pytest.raises(RunError, match=rf"does not answer SSH \(2 hosts, .*, or end it{ends}"):
        cluster.is_up(file)
    assert account.alive() == ["head", "worker"]
    cluster.down(file)
    assert account.alive() == []


def test_a_head_that_another_machine_sets_up_is_waited_for_but_not_for_ever(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, said = account.file(), []
    started = account.start("head", "setting-up")
    monkeypatch.setattr(cluster, "POLL_S", 0.1)
    monkeypatch.setattr(cluster, "SET_UP_S", 0)
    with pytest.raises(RunError, match=r"is still being set up \(setting-up\), .* or end it: python launch.py down"):
        cluster.bring_up(file, quietly, said.append)

    def becomes_ready(text: str) -> None:
        said.append(text)
        account.ec2.create_tags(Resources=[started], Tags=[{"Key": "ray-node-status", "Value": "up-to-date"}])

    monkeypatch.setattr(cluster, "SET_UP_S", 60)
    with pytest.raises(RunError, match="the head does not answer SSH"):  # which it is asked for once it is ready
        cluster.bring_up(file, quietly, becomes_ready)
    (line,) = said
    assert "is being set up (setting-up)" in line
    assert line.endswith(f"To end it: python launch.py down --cluster {file.path}")

    account.ec2.create_tags(Resources=[started], Tags=[{"Key": "ray-node-status", "Value": "setting-up"}])
    cluster._unfinished(file).touch()  # as by a kill -9 of the command that set it up
    with pytest.raises(RunError, match=r"was cut off \(1 host, .*, end it: python launch.py down"):
        cluster.bring_up(file, quietly, said.append)
    assert len(said) == 1


def failing(file: ClusterFile, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """The error of a start whose head never answers SSH, and what was said."""
    monkeypatch.setenv("AUTOSCALER_NODE_START_WAIT_S", "1")
    said: list[str] = []
    with pytest.raises(RunError) as caught:
        cluster.up(file, quietly, said.append)
    return str(caught.value), said


def test_a_start_that_fails_ends_what_it_began_and_nothing_else(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, before = account.file(), account.start("worker")
    error, said = failing(file, monkeypatch)
    assert "the head does not answer SSH; nothing is left running" in error
    assert said == [f"taking {file.name} down"]
    assert account.alive() == ["worker"]
    assert account.state(before) == "running"
    assert not cluster._unfinished(file).exists()


def test_a_start_that_finds_the_head_of_another_command_neither_restarts_nor_ends_it(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = account.file()
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "_undo", lambda *given: "")
        failing(file, patch)  # leaves a head such as another command has begun
    error, said = failing(file, monkeypatch)
    assert "the head is another command's and was left alone" in error
    assert not said
    assert account.alive() == ["head"]


def test_of_two_commands_at_once_one_brings_the_cluster_up_and_the_other_uses_it(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher's work takes a while here and does nothing; who calls it is what is looked at."""
    file, is_there, starts = account.file(), threading.Event(), []

    def start(*given: Any) -> None:
        starts.append(threading.get_ident())
        time.sleep(1)
        is_there.set()

    monkeypatch.setattr(cluster, "up", start)
    monkeypatch.setattr(cluster, "_look", lambda file: Found(head.ANSWERS if is_there.is_set() else head.NONE))
    raised: list[bool] = []
    commands = [
        threading.Thread(target=lambda: raised.append(cluster.bring_up(file, quietly, quietly))) for _ in range(2)
    ]
    for command in commands:
        command.start()
    for command in commands:
        command.join()
    assert len(starts) == 1
    assert sorted(raised) == [False, True]


def test_stopped_instances_are_seen_and_ended(account: Account) -> None:
    """Those that Ray stops where a file leaves `cache_stopped_nodes` on."""
    file = account.file()
    stopped = account.start("head")
    account.ec2.stop_instances(InstanceIds=[stopped])
    assert [one["state"] for one in aws.instances(file)] == ["stopped"]
    assert not cluster.is_up(file)
    cluster.down(file)
    assert account.state(stopped) == "terminated"
