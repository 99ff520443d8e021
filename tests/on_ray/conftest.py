"""Fixtures of the tests of clusters that need no hosts: a cloud's account, and a dashboard on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.on_ray.account import account, moto  # noqa: F401
from tests.on_ray.job_server import JobServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[JobServer]:
    with JobServer(tmp_path) as made:
        yield made
