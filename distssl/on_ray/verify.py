"""The certificate on a cluster: the same steps, by workers that Ray Train puts on its hosts."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from distssl import collectives
from distssl import verify as certificate
from distssl.errors import ConfigError, RunError
from distssl.on_ray import network, place, waiting
from distssl.on_ray.pretrain import last_line
from distssl.verify import Case, Record


class Shelf:
    """Where rank 0 leaves what the driver wants, beside the driver."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def put(self, records: list[Record]) -> None:
        self._records = records

    def take(self) -> list[Record]:
        return self._records


def elsewhere(cases: Sequence[Case], world_size: int) -> list[Record]:
    """The records of cases by so many workers of the cluster. Raises ConfigError where it has no room for them."""
    room = place.start()
    if world_size > room.most:
        raise ConfigError(f"--world-sizes {world_size}: the cluster has room for {room.most} workers")
    shelf = place.beside_driver(Shelf)
    name = f"verify-{ray.get_runtime_context().get_job_id()}-{world_size}"
    trainer = TorchTrainer(
        _work,
        train_loop_config={"cases": list(cases), "shelf": shelf, "name": name},
        **network.layout(world_size, room.share),
        run_config=train.RunConfig(
            name=name,
            storage_path=os.environ.get(place.STORAGE, tempfile.gettempdir()),
            logging_config=train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        with waiting.told():
            trainer.fit()
    except TrainingFailedError as error:
        raise RunError(f"{world_size} workers failed: {last_line(error)}") from error
    return ray.get(shelf.take.remote())


def _work(given: dict[str, Any]) -> None:
    logging.getLogger("distssl").setLevel(logging.WARNING)
    folder = Path(tempfile.gettempdir()) / f"distssl-{given['name']}"  # each host has its own
    packed = certificate.pack(folder)
    records = [certificate.record(case, packed, folder / "runs") for case in given["cases"]]
    if collectives.rank() == 0:
        ray.get(given["shelf"].put.remote(records))
