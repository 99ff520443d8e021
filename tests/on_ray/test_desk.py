"""Who is asked to stop: the workers that are at the desk, and nobody where there are none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from distssl.errors import RunError
from distssl.on_ray import ask_to_stop, desk, place
from distssl.on_ray.desk_actor import Desk


class Near:
    """A desk of this process, spoken with as with an actor."""

    def __init__(self) -> None:
        self.desk = Desk()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.desk, name)
        return type("Method", (), {"remote": staticmethod(method)})


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> Iterator[Near]:
    made = Near()
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    monkeypatch.setattr(place, "start", lambda: None)
    monkeypatch.setattr(desk, "find", lambda name: made)
    yield made
    logging.disable(logging.NOTSET)  # a worker that tells of a mistake has nothing more to log


def asked() -> int:
    """The exit code of who asks the run."""
    try:
        ask_to_stop.main("mine")
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_a_run_whose_workers_wait_for_hosts_has_no_ears(near: Near) -> None:
    assert asked() == 1
    with desk.mistakes_told(near):
        assert asked() == 0
        assert near.desk.stop_asked()
    assert asked() == 1  # they have gone, as at a drain


def test_a_worker_that_fails_goes_and_the_others_hear(near: Near, monkeypatch: pytest.MonkeyPatch) -> None:
    near.desk.come(1)
    with pytest.raises(ZeroDivisionError), desk.mistakes_told(near):
        raise ZeroDivisionError
    assert asked() == 0
    near.desk.go(1)
    with desk.mistakes_told(near):
        raise RunError("nothing comes of it")
    assert asked() == 1
    assert near.desk.outcomes() == [{"failed": "nothing comes of it"}]
