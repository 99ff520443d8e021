"""What the record of a run does where it cannot be written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distssl import monitor
from distssl.errors import ConfigError
from tests import disks


def log_much(record: monitor.Monitor) -> None:
    for step in range(1, 1000):  # the first lines may fit into the last block
        record.log(step, {"loss": 1.0})


def test_a_disk_too_full_for_another_line_is_told_in_one_line(tmp_path: Path) -> None:
    with disks.small(tmp_path / "disk", megabytes=1) as disk:
        record = monitor.Monitor(disk, step=0)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))
        with pytest.raises(ConfigError, match=r"metrics\.jsonl: the disk is full"):
            log_much(record)
