"""What every host is given lies in its user's home, wherever that is: by Ray's own updater, over a stand-in of SSH."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.updater import NodeUpdater
from ray.autoscaler.node_provider import NodeProvider

from distssl.on_ray import spot_watcher, token
from distssl.on_ray.cluster_file import ClusterFile
from tests.on_ray import test_cluster_file

# Runs what it is asked for on this machine, in another home, as sshd does: by the user's shell, from there.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do
  case $1 in -i|-o|-l) shift 2;; *) shift;; esac
done
shift
export HOME={home}
cd && exec bash -c "$*"
"""
FILES = (".ray/auth_token", ".distssl/requirements.txt", ".distssl/spot_watcher.py")


class Hosts(NodeProvider):
    """One of them, reached by its address."""

    def is_terminated(self, node_id: str) -> bool:
        return False

    def internal_ip(self, node_id: str) -> str:
        return "192.0.2.1"

    external_ip = internal_ip


def updater(tree: dict[str, Any], mounts: dict[str, str]) -> NodeUpdater:
    """Of a host that gets mounts, as the launcher and the autoscaler make one."""
    return NodeUpdater(
        node_id="host",
        provider_config=tree["provider"],
        provider=Hosts(tree["provider"], tree["cluster_name"]),
        auth_config=tree["auth"],
        cluster_name=tree["cluster_name"],
        file_mounts=mounts,
        initialization_commands=[],
        setup_commands=[],
        ray_start_commands=[],
        runtime_hash="",
        file_mounts_contents_hash="",
        is_head_node=False,
    )


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterFile:
    """Of a user whose home is `client`, with a token."""
    monkeypatch.setenv("HOME", str(tmp_path / "client"))
    token.FILE.expanduser().parent.mkdir(parents=True)
    token.FILE.expanduser().write_text("a token")
    return test_cluster_file.opened(test_cluster_file.minimal(), tmp_path)


@pytest.mark.skipif(shutil.which("rsync") is None, reason="needs rsync")
def test_every_host_gets_them_in_its_own_home(
    file: ClusterFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write()
    ssh = tmp_path / "bin/ssh"
    ssh.parent.mkdir()
    monkeypatch.setenv("PATH", str(ssh.parent), prepend=":")
    mounts = file.config["file_mounts"]
    for name in ("people/the head", "srv/worker"):
        home = tmp_path / name
        home.mkdir(parents=True)
        ssh.write_text(SSH.format(home=f"'{home}'"))
        ssh.chmod(0o755)
        node = updater(file.config, mounts)
        node.sync_file_mounts(node.rsync_up)
        assert sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()) == sorted(FILES)
        assert (home / FILES[0]).read_text() == "a token"
        assert (home / FILES[2]).read_bytes() == Path(spot_watcher.__file__).read_bytes()
        # The head passes on what it has where it was put, as Ray's launcher writes into its file.
        monkeypatch.setenv("HOME", str(home))
        mounts = {there: there for there in mounts}


def test_a_container_gets_them_in_the_home_of_its_image(file: ClusterFile) -> None:
    mounts = file.config["file_mounts"]
    command = docker_start_cmds("ubuntu", "image", mounts, "name", [], "mine", "/srv/me", "docker")
    given = [part.split(":")[1] for part in command.split() if part.startswith("/tmp/ray_tmp_mount")]
    assert given == ["/srv/me/.ray/auth_token", "/srv/me/.distssl"]
