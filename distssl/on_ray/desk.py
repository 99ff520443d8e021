"""Where a run's driver and its workers, on any host, leave each other word: an actor beside the driver.

The run folder cannot serve for this: on a cluster each host has its own copy.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayActorError

from distssl import collectives
from distssl.errors import ConfigError, RunError, last_line
from distssl.on_ray import place
from distssl.on_ray.desk_actor import Desk

NAMESPACE = "distssl"
GRACE_S = 10  # between the first worker that tells of a mistake and the last, where all of them met it


def name_of(run_name: str) -> str:
    return f"desk-{run_name}"


def open_for(run_name: str) -> Any:
    """A desk on this host, which ends with the driver that opened it.

    Raises ConfigError where another driver trains the run.
    """
    try:
        desk = place.beside_driver(Desk, name=name_of(run_name), namespace=NAMESPACE)
        ray.get(desk.outcomes.remote())
    except ValueError:  # the name is taken
        raise ConfigError(
            f"name={run_name}: another job of this cluster trains this run; attach to it or stop it"
        ) from None
    return desk


def open_unnamed() -> Any:
    """A desk on this host for what any number of drivers may do, which ends with the driver that opened it."""
    return place.beside_driver(Desk)


def find(run_name: str) -> Any | None:
    """The desk of a run that is being trained; None where there is none."""
    try:
        return ray.get_actor(name_of(run_name), NAMESPACE)
    except ValueError:
        return None


def outcomes(the_desk: Any) -> list[dict[str, Any]]:
    """What the workers told so far. Raises RunError where the desk is gone, as with a host without memory."""
    try:
        return ray.get(the_desk.outcomes.remote())
    except RayActorError as error:
        raise RunError(f"Ray lost the actor that this run's workers report to: {last_line(error)}") from None


def tell(the_desk: Any, rank: int, outcome: Any) -> None:
    """Leave for the driver what came of a worker's work, or the ConfigError or RunError that says why nothing can."""
    if isinstance(outcome, ConfigError | RunError):
        logging.disable(logging.ERROR)  # the driver says it in one line, Ray would with a traceback
    ray.get(the_desk.tell.remote(rank, _outcome_of(outcome)))


@contextmanager
def mistakes_told(the_desk: Any) -> Iterator[None]:
    """On each worker, which is there for as long: leave a ConfigError or RunError of the block for the driver.

    That ends the block. It is raised again where not every worker has told of one: the others wait for this one in a
    collective, and a restart ends them.
    """
    ray.get(the_desk.come.remote(collectives.rank()))
    try:
        yield
    except (ConfigError, RunError) as error:
        tell(the_desk, collectives.rank(), error)
        if not _all_told(the_desk):
            raise
    finally:
        with suppress(RayActorError):  # it is gone, which the block has met
            ray.get(the_desk.go.remote(collectives.rank()))


def _all_told(the_desk: Any) -> bool:
    """Whether every worker has told of an outcome, or does within GRACE_S."""
    deadline = time.monotonic() + GRACE_S
    num = collectives.world_size()
    while (some := len(outcomes(the_desk)) < num) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not some


def _outcome_of(told: Any) -> dict[str, Any]:
    """Plain data, where nothing can come of the work."""
    if isinstance(told, ConfigError):
        return {"wrong_input": list(told.messages)}
    if isinstance(told, RunError):
        return {"failed": str(told)}
    return {"finished": told}


def result(told: list[dict[str, Any]]) -> Any:
    """What came of the first worker's work. Raises the ConfigError or RunError that a worker told of."""
    for outcome in told:
        if "wrong_input" in outcome:
            raise ConfigError(*outcome["wrong_input"])
        if "failed" in outcome:
            raise RunError(outcome["failed"])
    if not told:
        raise RunError("the workers ended without a word; the lines above say why")
    return told[0]["finished"]
