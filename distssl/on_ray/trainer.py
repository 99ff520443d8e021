"""TorchTrainers without the actors of Ray Train that their work has no use for.

Each actor takes a second to start, and one that is idle still polls a hundred times a second: on two cores that two
workers fill, it comes off their steps. What is left out here is internal to Ray, whose version the project pins.
"""

from __future__ import annotations

from typing import Any, ClassVar

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from distssl.on_ray import place


class Trainer(TorchTrainer):
    """For workers that read no dataset of Ray's."""

    unused: ClassVar[tuple[type, ...]] = (DatasetsCallback,)

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, self.unused)]

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        if not place.on_cluster():
            given["scaling_policy"] = _OfThisMachine(self.scaling_config)
        return super()._initialize_and_run_controller(**given)


class JobTrainer(Trainer):
    """For work that is all that its driver does, and that leaves Ctrl-C to its caller."""

    # It gives back what the workers of a dead controller hold. Here the driver ends with its controller, and Ray frees
    # what a finished job has held.
    unused = (*Trainer.unused, PlacementGroupCleanerCallback)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's own would abort the run where ours asks it to save and stop."""


class _OfThisMachine(FixedScalingPolicy):
    """Asks no autoscaler for hosts: there is none."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ray's own starts the actor that is asked."""

    def _maybe_send_resource_request(self) -> None:
        """Nor at any time after."""
