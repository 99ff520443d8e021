"""Weights of a backbone outside a checkpoint: a safetensors file that says which network they are of.

`export` writes such files, and a run that starts from another's backbone keeps those weights as one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from distssl import atomic, collectives
from distssl.config import Model
from distssl.context import Context
from distssl.errors import ConfigError
from distssl.nn.backbones import Backbone

KEPT = "checkpoints/init.safetensors"  # in a run folder: what its backbone started from
NETWORK = ("backbone", "stem", "sobel", "options")  # of config.Model: what makes the network


@dataclass(frozen=True)
class Weights:
    """model: the network they are of. state: its parameters and buffers by name, on the CPU."""

    model: Model
    state: dict[str, Tensor]

    @classmethod
    def of(cls, backbone: Backbone, model: Model) -> Weights:
        """A copy of a backbone's."""
        state = {name: value.detach().cpu().contiguous().clone() for name, value in backbone.state_dict().items()}
        return cls(model.untrained, state)

    @property
    def sha256(self) -> str:
        return digest(dict(sorted(self.state.items())))

    def keep(self, run_dir: Path) -> Path:
        """Write them into a run folder as what it starts from."""
        path = run_dir / KEPT
        atomic.make_folder(path.parent)
        with atomic.replacing(path) as part:
            write(self, part)
        return path

    @classmethod
    def kept(cls, model: Model, context: Context) -> Weights | None:
        """What a run starts from, as `keep` left it; None where that is nothing. Every rank calls it."""
        if model.init is None:
            return None
        found = collectives.together(lambda: _kept(model, context) if context.rank == 0 else None)
        return collectives.broadcast_object(found)


def digest(state: Mapping[str, Tensor]) -> str:
    """What changes with any parameter or buffer."""
    found = hashlib.sha256()
    for name, value in state.items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def write(weights: Weights, path: Path, **told: str) -> None:
    """told: what else the file is to say of itself."""
    from safetensors import torch as safetensors

    network = {key: json.dumps(getattr(weights.model, key)) for key in NETWORK}
    safetensors.save_file(weights.state, path, metadata={**told, **network})
    path.chmod(0o666 & ~_umask())  # safetensors lets nobody else read it


def _umask() -> int:
    found = os.umask(0o077)
    os.umask(found)
    return found


def read(path: Path | str) -> Weights:
    """What `write` wrote. Raises ConfigError for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as opened:
            told = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it has no other iterator
        model = Model(**{key: json.loads(told[key]) for key in NETWORK})
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (SafetensorError, KeyError, ValueError):
        raise ConfigError(f"{path}: not a backbone; a file of `export --format safetensors` is right") from None
    return Weights(model, state)


def load(weights: Weights, backbone: Backbone, model: Model) -> None:
    """Give a backbone the weights. Raises ConfigError where they are of another network than its model."""
    problem = _problem(weights, backbone, model)
    if problem:
        raise ConfigError(f"model.init={model.init}: {problem}")
    backbone.load_state_dict(weights.state)


def _problem(weights: Weights, backbone: Backbone, model: Model) -> str | None:
    for key in ("backbone", "stem", "sobel"):
        there, here = (json.dumps(getattr(found, key)).strip('"') for found in (weights.model, model))
        if there != here:
            return f"its network has model.{key}={there}, this run's {here}; the same is right"
    ours, theirs = ({name: list(x.shape) for name, x in s.items()} for s in (backbone.state_dict(), weights.state))
    for name in [*ours, *theirs]:
        there, here = theirs.get(name, "not there"), ours.get(name, "not there")
        if there != here:
            options = json.dumps(weights.model.options)
            return f"{name} is {there}, in this run {here}; a network as that of model.options={options} is right"
    return None


def _kept(model: Model, context: Context) -> Weights:
    if context.mirror:
        context.mirror.pull_file(KEPT)
    path = context.run_dir / KEPT
    found = read(path)
    if found.sha256 != model.init_sha256:
        raise ConfigError(f"{path}: damaged: its weights have not the sha256 {model.init_sha256} of this run's config")
    return found
