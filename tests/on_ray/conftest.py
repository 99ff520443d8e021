"""A dashboard on this machine, for the tests of what speaks with one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.on_ray.job_server import JobServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[JobServer]:
    with JobServer(tmp_path) as made:
        yield made
