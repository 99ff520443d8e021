"""What is refused before a cluster is brought up."""

from __future__ import annotations

from pathlib import Path

import pytest

from distssl.errors import ConfigError
from distssl.on_ray import remote
from distssl.on_ray.place import Workers
from tests import runs


def test_lanes_are_refused_for_a_number_of_workers_that_the_user_names_alone(tmp_path: Path) -> None:
    """Without one the job takes two of the three: the most that divide the lanes."""
    room = Workers(3, 1, 0)
    remote._check_lanes(runs.tiny(tmp_path, tmp_path, "data.lanes=4", "machine.workers=null"), room)
    with pytest.raises(ConfigError, match=r"machine.workers=3 does not divide data.lanes=4; right here: \[1, 2\]"):
        remote._check_lanes(runs.tiny(tmp_path, tmp_path, "data.lanes=4", "machine.workers=3"), room)
