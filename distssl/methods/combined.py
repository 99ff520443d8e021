"""Combined: several tasks at once over one backbone, each image decoded once for all of them.

    L = sum_m w_m L_m

over the methods m of `parts`, each with its own views, heads and loss.

Carl Doersch, Andrew Zisserman: Multi-task Self-Supervised Visual Learning. ICCV 2017. https://arxiv.org/abs/1708.07860

Each part keeps its own views, where the paper makes their inputs alike. A part's own rates and teachers are as it has
them alone; the backbone's rate is the run's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import nn

from distssl import method
from distssl.nn import optim
from distssl.nn.per_sample import Embedded

SHARED = ("id", "label")  # views that every part gets


class Config(method.Options):
    """parts: method name -> its options, and its `weight` (1)."""

    parts: dict[str, dict[str, Any]] = Field(
        default={"rotation": {}, "simclr": {}}, min_length=1, validate_default=True
    )

    small: ClassVar = {
        "parts": {
            "rotation": {"weight": 0.5, "augment": {"resize_px": 36, "size_px": 32}},
            "moco_v2": {"projector": [32, 16], "queue": 40, "augment": {"size_px": 32}},
            "simclr": {"projector": [32, 16], "augment": {"size_px": 32}},
        }
    }

    @field_validator("parts", mode="after")
    @classmethod
    def _complete(cls, parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Every part's options checked, with its defaults filled in."""
        complete = {}
        for name, options in parts.items():
            weight = options.get("weight", 1.0)
            if not isinstance(weight, (int, float)) or weight <= 0:
                raise ValueError(f"parts.{name}.weight={weight!r}: a number above 0 is right")
            found = method.find(name)
            if found.learns_from_labels or found.embeds or name == "combined":
                wants = "learns from labels" if found.learns_from_labels else "clusters the whole dataset"
                raise ValueError(f"parts.{name} {wants if name != 'combined' else 'has parts'}: it cannot be a part")
            own = {key: value for key, value in options.items() if key != "weight"}
            complete[name] = {"weight": weight, **method.options(name).model_validate(own).model_dump(mode="json")}
        return complete


class Combined(method.Method):
    Config = Config

    def build(self) -> None:
        self.parts = nn.ModuleDict()
        learning = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        needed: set[nn.Parameter] = set()
        for name, options in self.cfg.parts.items():
            part = method.find(name)(_own_config(name, options), self.backbone)
            # The backbone is this module's: were it each part's as well, a checkpoint would hold it once for each.
            del part.backbone
            object.__setattr__(part, "backbone", self.backbone)
            self.parts[name] = part
            needed.update(parameter for parameter in learning if parameter.requires_grad)
            for parameter in learning:  # what this part does not need another may
                parameter.requires_grad_(True)
        for parameter in learning:
            parameter.requires_grad_(parameter in needed)

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        sample = sample.decoded()
        found = {}
        for name, options in cfg.parts.items():
            for key, view in method.find(name).views(_own_config(name, options), sample).items():
                found[f"{name}.{key}"] = view
        return found

    @classmethod
    def reads_masks(cls, cfg: Config) -> bool:
        return any(method.find(name).reads_masks(_own_config(name, own)) for name, own in cfg.parts.items())

    def loss(self, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs: dict[str, torch.Tensor] = {}
        total = []
        for name, part in self._methods():
            part.epoch, part.num_steps, part.progress = self.epoch, self.num_steps, self.progress
            of_part = part.loss(_own_views(name, views))
            total.append(self.cfg.parts[name]["weight"] * of_part["loss"])
            outputs |= {f"{name}/{key}": value for key, value in of_part.items() if value.ndim == 0}
            if "embeddings" in of_part:
                outputs.setdefault("embeddings", of_part["embeddings"])
        return outputs | {"loss": torch.stack(total).sum()}

    def on_epoch_start(self, epoch: int, features: Embedded | None = None) -> dict[str, float]:
        del features
        figures = {}
        for name, part in self._methods():
            part.epoch = epoch
            figures |= {f"{name}/{key}": value for key, value in part.on_epoch_start(epoch).items()}
        return figures

    def made_anew(self) -> list[nn.Parameter]:
        return [parameter for _, part in self._methods() for parameter in part.made_anew()]

    def on_step_end(self, progress: float) -> None:
        for _, part in self._methods():
            part.on_step_end(progress)

    def rate(self, name: str, parameter: nn.Parameter) -> optim.Rate:
        section, _, rest = name.partition(".")
        if section != "parts":
            return optim.Rate()
        part, _, own_name = rest.partition(".")
        return self._part(part).rate(own_name, parameter)

    def picture(self, views: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [image for name, part in self._methods() for image in part.picture(_own_views(name, views))]

    @classmethod
    def view_size_px(cls, cfg: Config) -> int:
        """The largest of the parts'."""
        sizes = [method.find(name).view_size_px(_own_config(name, options)) for name, options in cfg.parts.items()]
        return max(sizes)

    def _methods(self) -> list[tuple[str, method.Method]]:
        return [(name, self._part(name)) for name in self.cfg.parts]

    def _part(self, name: str) -> method.Method:
        part = self.parts[name]
        assert isinstance(part, method.Method)
        return part


def _own_config(name: str, options: dict[str, Any]) -> method.Options:
    return method.options(name)(**{key: value for key, value in options.items() if key != "weight"})


def _own_views(name: str, views: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A part's views under its own names."""
    prefix = f"{name}."
    own = {key.removeprefix(prefix): views[key] for key in views if key.startswith(prefix)}
    return own | {key: views[key] for key in SHARED}
