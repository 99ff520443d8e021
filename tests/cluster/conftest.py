"""What the tests of clusters need of this machine, and clouds and networks that end with the test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import browser, debian
from tests.cluster import hosts, two_hosts
from tests.cluster.cloud import Cloud
from tests.cluster.two_hosts import TwoHosts
from tests.cluster.user import User


@pytest.fixture(scope="session")
def namespaces() -> None:
    """Skips where hosts cannot be made of namespaces."""
    reason = hosts.missing() or debian.install(["openssh-server", "openssh-client", "rsync", "iproute2"])
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Installed before a test is in a network of its own."""
    return browser.installed()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that all hosts see at the same place: not below /tmp, of which each has its own."""
    folder = Path(tempfile.mkdtemp(prefix="distssl-test-", dir="/var/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cloud(namespaces: None, shared: Path) -> Iterator[Cloud]:
    with Cloud(shared / "cloud") as made:
        yield made


@pytest.fixture
def user(cloud: Cloud, shared: Path) -> Iterator[User]:
    made = User(cloud.environment, shared)
    yield made
    made.close()


@pytest.fixture(scope="module")
def pair(namespaces: None, shared: Path) -> Iterator[TwoHosts]:
    with two_hosts.started(shared) as made:
        yield made
