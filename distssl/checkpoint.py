"""Checkpoints: everything a run needs to go on, written atomically, checked when read.

A checkpoint is a folder checkpoints/step_NNNNNNNN with state.pt and manifest.json (bytes and sha256 of the state,
the metrics at that step). It is written under another name, flushed to the disk and renamed, so a folder of that name
is whole or damaged later, which the sum shows. `mirrored` is about those of a run folder that lies at a URL.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from distssl import atomic, config
from distssl.config import Run
from distssl.data.shards import Dataset
from distssl.errors import ConfigError, first_line

log = logging.getLogger(__name__)

STATE = "state.pt"
MANIFEST = "manifest.json"
LOWER_IS_BETTER = ("loss", "reconstruction", "supervised", "consistency", "alignment", "uniformity", "objective")


class DamagedError(ConfigError):
    """A checkpoint that is not whole."""


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def snapshot(value: Any) -> Any:
    """A copy on the CPU that later steps cannot change; tensors inside dicts and lists are copied."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value


def write(run_dir: Path, step: int, state: Mapping[str, Any], metrics: Mapping[str, float]) -> Path:
    """Write checkpoints/step_NNNNNNNN and return it. state: tensors and plain data, as `snapshot` makes it.

    Raises ConfigError where the disk is full; what was there before stays.
    """
    final = folder(run_dir) / f"step_{step:08d}"
    staging = folder(run_dir) / f".step_{step:08d}.{os.getpid()}"
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with open(staging / STATE, "wb") as file:
            torch.save(dict(state), file)
            os.fsync(file.fileno())
        manifest = {"step": step, "metrics": dict(metrics), "bytes": (staging / STATE).stat().st_size}
        manifest["sha256"] = sha256(staging / STATE)
        with open(staging / MANIFEST, "w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            shutil.rmtree(final)  # of an earlier attempt at this step, damaged or about to be the same
        staging.rename(final)
    except (OSError, RuntimeError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save fails anew when closing its zip
        if not isinstance(cause, OSError):
            raise
        raise ConfigError(f"machine.storage={run_dir.parent}: cannot write {final.name}: {cause.strerror}") from error
    return final


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's state, on the CPU, and its file's "sha256". Raises DamagedError where it is not whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        size = (path / STATE).stat().st_size
        if size != manifest["bytes"]:
            raise DamagedError(f"checkpoint {path}: {STATE} has {size} bytes, its manifest says {manifest['bytes']}")
        if sha256(path / STATE) != manifest["sha256"]:
            raise DamagedError(f"checkpoint {path}: {STATE} does not have the sha256 of its manifest")
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        return {**state, "sha256": manifest["sha256"]}
    except FileNotFoundError as error:
        raise DamagedError(f"checkpoint {path}: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"checkpoint {path}: cannot be read: {first_line(error)}") from None


def newest(run_dir: Path) -> dict[str, Any] | None:
    """The state of the newest whole checkpoint; None where there never was one.

    A damaged one is named and passed over. Raises ConfigError where all are damaged: starting again from nothing
    would hide the loss.
    """
    tried, mistakes = None, []
    while (paths := sorted(folder(run_dir).glob("step_*"), reverse=True)) != tried:  # a run that goes on replaces them
        tried, mistakes = paths, []
        for path in paths:
            try:
                return read(path)
            except DamagedError as error:
                if path.exists():
                    log.warning("%s", error)
                    mistakes += error.messages
    if mistakes:
        raise ConfigError(*mistakes, f"no checkpoint of {run_dir} is whole: remove {folder(run_dir)} to start again")
    return None


def require_same(state: Mapping[str, Any], run: Run, dataset: Dataset, labelled: Dataset | None) -> None:
    """Raises ConfigError with a line for each thing that decides the result and is another in a checkpoint's state."""
    differs = config.differences(config.parse(state["config"], run.run_dir), run)
    if state["dataset"] != dataset.fingerprint:
        differs.append(f"data.source: dataset {state['dataset'][:12]} there, {dataset.fingerprint[:12]} here")
    if labelled and state["labelled"] != labelled.fingerprint:
        differs.append("data.labelled: other images there")
    if differs:
        raise ConfigError(*(f"{run.run_dir} holds another run: {line}" for line in differs))


def warn_of_unknown(keep_best: str | None, metrics: Mapping[str, float]) -> None:
    """Name in one line of the log a checkpoint.keep_best that is none of the metrics of a line of the log.

    kNN's is not among them: it comes with the first evaluation, and not at all where there are no labels.
    """
    if keep_best not in (None, "knn", *metrics):
        log.warning(
            "checkpoint.keep_best=%s: no such metric, so no best checkpoint is kept; there is knn, where there are "
            "labels, and %s",
            keep_best,
            ", ".join(sorted(metrics)),
        )


def add_metrics(run_dir: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Note metrics that were found later in the checkpoint of a step, where that is still there."""
    path = folder(run_dir) / f"step_{step:08d}" / MANIFEST
    data = _bytes(path)
    if data is not None:
        write_manifest(path.parent, with_metrics(data, metrics))


def with_metrics(manifest: bytes, metrics: Mapping[str, float]) -> bytes:
    """A manifest with more metrics."""
    there = json.loads(manifest)
    return json.dumps(there | {"metrics": there["metrics"] | metrics}, indent=1).encode()


def write_manifest(path: Path, data: bytes) -> None:
    with atomic.replacing(path / MANIFEST) as part:
        part.write_bytes(data)


def prune(run_dir: Path, *, keep_last: int, keep_best: str | None, keep_steps: Collection[int] = ()) -> None:
    """Delete all checkpoints but the newest `keep_last`, the best by a metric and those of steps.

    And what writers that were killed left half done: call it from the one process that writes here, between writes.
    """
    paths = {step_of(path.name): path for path in folder(run_dir).glob("step_*")}
    scores = {step: metric(_bytes(path / MANIFEST), keep_best) for step, path in paths.items()}
    staying = kept(scores, keep_last, keep_best, keep_steps)
    for path in (*paths.values(), *folder(run_dir).glob(".step_*")):
        if path.name.startswith(".") or step_of(path.name) not in staying:
            shutil.rmtree(path)


def kept(
    scores: Mapping[int, float | None], keep_last: int, keep_best: str | None, keep_steps: Collection[int]
) -> set[int]:
    """Of the steps with these scores those that stay; keep_best: what the scores are."""
    staying = {*sorted(scores, reverse=True)[:keep_last], *keep_steps}
    scored = {step: score for step, score in sorted(scores.items()) if score is not None}
    if scored:
        best = min if (keep_best or "").rpartition("/")[2] in LOWER_IS_BETTER else max  # simclr/loss: of `combined`
        staying.add(best(scored, key=lambda step: scored[step]))
    return staying


def step_of(name: str) -> int:
    """The step of checkpoints/step_NNNNNNNN/FILE, or of step_NNNNNNNN."""
    return int(name.rpartition("step_")[2][:8])


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None  # damaged


def metric(manifest: bytes | None, name: str | None) -> float | None:
    """One of a manifest's metrics, None where it has none of this name."""
    try:
        return json.loads(manifest or b"")["metrics"].get(name)
    except (ValueError, KeyError):
        return None  # damaged: it has no score, and is kept or deleted by its age


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
