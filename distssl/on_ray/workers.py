"""Workers of Ray Train that do a piece of work together, restarted when they die, and give it to their driver."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import ray
from ray import train
from ray.train.v2.api.exceptions import TrainingFailedError

from distssl import collectives
from distssl.errors import RunError, last_line
from distssl.on_ray import desk, network, waiting
from distssl.on_ray.trainer import JobTrainer

Work = Callable[[Any], Any]  # what each worker does, given the driver's desk; picklable

MOST_FAILURES = 5  # of workers in one piece of work; preemptions are not counted by Ray


def run(
    work: Work,
    num_workers: int,
    share: dict[str, int],
    the_desk: Any | None = None,
    *,
    name: str | None = None,
    storage: str | None = None,
) -> Any:
    """What rank 0's `work` returned. Each worker takes a share of a host: {"CPU": ..., "GPU": 0 or 1}.

    name, storage: where Ray may keep what it notes of checkpoints; work that reports none needs neither.
    Raises ConfigError or RunError as the workers did, and RunError where they kept dying.
    """
    at: Any = desk.open_unnamed() if the_desk is None else the_desk
    with tempfile.TemporaryDirectory(prefix="distssl-ray-") as scratch:
        trainer = JobTrainer(
            _work,
            # By reference: the controller unpickles this, and need not import what the work does.
            train_loop_config={"work": ray.put(work), "desk": at},
            **network.layout(num_workers, share),
            run_config=train.RunConfig(
                name=name,
                storage_path=storage or scratch,
                failure_config=train.FailureConfig(max_failures=MOST_FAILURES),
                logging_config=train.LoggingConfig(log_level="WARNING"),
            ),
        )
        try:
            with waiting.told():
                trainer.fit()
            outcomes = desk.outcomes(at)
        except TrainingFailedError as error:
            outcomes = desk.outcomes(at)
            if not outcomes:
                raise RunError(
                    f"workers failed more than {MOST_FAILURES} times, at last: {last_line(error)}"
                ) from error
    return desk.result(outcomes)


def _work(given: dict[str, Any]) -> None:
    """One worker. What a restart cannot mend, and what comes of the work, is left for the driver."""
    logging.getLogger().setLevel(logging.WARNING)  # Ray tells of every report under the name of a file of its own
    logging.getLogger("distssl").setLevel(logging.INFO)
    the_desk = given["desk"]
    if any("finished" not in outcome for outcome in desk.outcomes(the_desk)):
        return
    with desk.mistakes_told(the_desk):
        work: Any = ray.get(given["work"])
        found = work(the_desk)
        if collectives.rank() == 0:
            desk.tell(the_desk, 0, found)
