"""A head that is there is used as it is, or left alone; what could not be ended is not said to be."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from distssl.on_ray import reaper
from tests.cluster import hosts
from tests.cluster.two_hosts import TwoHosts
from tests.cluster.user import wait

pytestmark = [pytest.mark.cloud, pytest.mark.slow, pytest.mark.timeout(900)]

GRACE_S = 30  # of a cluster without work
KEPT_S = 12  # Ray's launcher keeps an SSH connection for the next command, whatever its key
VERIFY = ("verify", "--methods", "simsiam", "--world-sizes", "1", "--detach")


def head_of(pair: TwoHosts) -> list[int]:
    """The process of Ray's on the head that there is one of."""
    found = []
    for pid in hosts._in_namespace(pair.network.hosts["head"].namespace):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if Path(f"/proc/{pid}/comm").read_text() == "gcs_server\n":
                found.append(pid)
    return found


def with_another_key(pair: TwoHosts, file: Path) -> Path:
    """The same cluster for somebody whom its hosts do not let in."""
    key = pair.shared / "other"
    hosts.call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    tree = yaml.safe_load(file.read_text())
    tree["auth"]["ssh_private_key"] = str(key)
    path = pair.shared / "other.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def with_one_host(pair: TwoHosts, file: Path) -> Path:
    """The same cluster by a file whose list is shorter than what its head was started with."""
    tree = yaml.safe_load(file.read_text())
    tree["provider"]["worker_ips"] = []
    path = pair.shared / "one.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_head_that_does_not_answer_is_neither_restarted_nor_ended(pair: TwoHosts) -> None:
    user, file = pair.user, pair.file()
    shut_out = with_another_key(pair, file)
    code, said = user.run(*VERIFY, "--cluster", shut_out)
    assert code == 1, said
    assert "the head does not answer SSH; nothing was changed" in said

    code, said = user.run(*VERIFY, "--cluster", file)
    assert code == 0, said
    assert "is up after" in said
    (head,) = head_of(pair)
    notes = Path(tempfile.gettempdir()) / "ray" / f"cluster-{yaml.safe_load(file.read_text())['cluster_name']}.state"
    notes.unlink()  # as on another machine of the same user
    code, said = user.run("status", "--cluster", file)
    assert code == 0, said
    assert "verify-1" in said
    code, said = user.run(*VERIFY, "--cluster", with_one_host(pair, file))
    assert code == 2, said
    assert 'is up with other hosts: provider.worker_ips was ["10.77.0.12"], is []. ' in said

    code, said = user.run(*VERIFY, "--cluster", file)
    assert code == 0, said
    assert head_of(pair) == [head]

    time.sleep(KEPT_S)
    code, said = user.run(*VERIFY, "--cluster", shut_out)
    assert code == 1, said
    assert "the head does not answer SSH; nothing was changed" in said
    os.kill(head, signal.SIGSTOP)
    code, said = user.run(*VERIFY, "--cluster", file)
    assert code == 1, said
    assert "is there, and Ray does not answer; nothing was changed" in said
    assert "Traceback" not in said
    os.kill(head, signal.SIGCONT)
    time.sleep(KEPT_S)
    code, said = user.run("down", "--cluster", shut_out)
    assert code == 1, said
    assert "may still be up" in said
    assert "nothing is left" not in said
    assert head_of(pair) == [head]
    code, said = user.run("down", "--cluster", file)
    assert code == 0, said
    assert not head_of(pair)


def test_a_head_ends_with_its_last_job(pair: TwoHosts) -> None:
    pair.of_jobs = {reaper.GRACE: str(GRACE_S)}
    user, file = pair.user, pair.file()
    code, said = user.run(*VERIFY, "--down-when-done", "--cluster", file)
    assert code == 0, said
    assert head_of(pair)
    wait(lambda: not head_of(pair), "the end of a head without work", 400 + GRACE_S)
    code, said = user.run("down", "--cluster", file)
    assert code == 0, said
