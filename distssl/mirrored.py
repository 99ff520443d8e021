"""Checkpoints of a run whose folder lies at a URL or is not the same for all ranks: which one everybody goes on from.

At a URL a checkpoint is whole once its manifest is there: that comes last and goes first. What lies on a node is of an
earlier start, perhaps of another run, and counts only where it is the same.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from distssl import atomic, checkpoint, collectives
from distssl.checkpoint import MANIFEST, STATE
from distssl.context import Context
from distssl.errors import ConfigError
from distssl.mirror import Mirror

log = logging.getLogger(__name__)


def newest(context: Context, run_dir: Path) -> dict[str, Any] | None:
    """`checkpoint.newest` of a folder of the run, the same on every rank: rank 0 chooses. Every rank calls it.

    With a mirror it is the newest whole one at the URL, and the only one that a node then has.
    """
    mirror = context.mirror
    if mirror is None:
        state = collectives.together(lambda: checkpoint.newest(run_dir) if context.rank == 0 else None)
        if not context.shares_run_dir:
            return collectives.broadcast_object(state)
        step: int | None = collectives.broadcast_object(state["step"] if state else None)
        return None if step is None else collectives.together(lambda: state or checkpoint.read(_path(run_dir, step)))
    with context.one_writer(checkpoint.folder(run_dir)):
        state = collectives.together(lambda: _newest_there(mirror, run_dir) if context.rank == 0 else None)
        step = collectives.broadcast_object(_only(run_dir) if context.rank == 0 else None)
        of_its_node = context.first_of_node and context.rank > 0
        collectives.together(lambda: _pull(mirror, run_dir, step) if of_its_node else None)
        if step is not None:
            state = collectives.together(lambda: state or checkpoint.read(_path(run_dir, step)))
    return state


def pull_newest(mirror: Mirror, run_dir: Path) -> None:
    """Have the newest whole checkpoint at the URL in a copy of the run folder, for a process that no rank waits for."""
    atomic.make_folder(checkpoint.folder(run_dir))
    with atomic.locked(checkpoint.folder(run_dir)):
        _newest_there(mirror, run_dir)


def commit(
    run_dir: Path,
    mirror: Mirror | None,
    step: int,
    state: Mapping[str, Any],
    metrics: Mapping[str, float],
    keep_last: int,
    keep_best: str | None,
    keep_steps: Collection[int] = (),
) -> Path:
    """Write a checkpoint and prune, here and then at the URL: what is committed is there. Rank 0 alone calls it."""
    path = checkpoint.write(run_dir, step, state, metrics)
    checkpoint.prune(run_dir, keep_last=keep_last, keep_best=keep_best, keep_steps=keep_steps)
    if mirror:
        with mirror.lock:
            _push(mirror, path)
            _prune(mirror, run_dir, keep_last, keep_best, keep_steps)
    return path


def remove_all(context: Context, run_dir: Path) -> None:
    """Delete the checkpoints of a folder of the run, on every node and at the URL. Every rank calls it."""
    if context.first_of_node:
        checkpoint.prune(run_dir, keep_last=0, keep_best=None)
    if context.mirror and context.rank == 0:
        with context.mirror.lock:
            _prune(context.mirror, run_dir, 0, None, ())


def add_metrics(run_dir: Path, mirror: Mirror | None, step: int, metrics: Mapping[str, float]) -> None:
    """`checkpoint.add_metrics`, here and at the URL."""
    checkpoint.add_metrics(run_dir, step, metrics)
    if mirror:
        name = f"{mirror.name(_path(run_dir, step))}/{MANIFEST}"
        with mirror.lock:  # or one that is deleted meanwhile would get its manifest back
            manifest = mirror.remote.read(name)
            if manifest is not None:
                mirror.remote.write(name, checkpoint.with_metrics(manifest, metrics))


def _push(mirror: Mirror, path: Path) -> None:
    name = mirror.name(path)
    mirror.remote.remove(f"{name}/{MANIFEST}")  # of an earlier attempt at this step: it would be of another state
    mirror.put(f"{name}/{STATE}")
    mirror.push(mirror.name(path.parent.parent))  # a run that goes on from here needs the lines up to here
    mirror.put(f"{name}/{MANIFEST}")


def _prune(mirror: Mirror, run_dir: Path, keep_last: int, keep_best: str | None, keep_steps: Collection[int]) -> None:
    """As `checkpoint.prune`, at the URL; what has no manifest is of an attempt that was cut short."""
    there, manifests = _listed(mirror, run_dir)
    scores = {step: checkpoint.metric(mirror.remote.read(name), keep_best) for step, name in manifests.items()}
    staying = manifests.keys() & checkpoint.kept(scores, keep_last, keep_best, keep_steps)
    gone = [name for name in there if checkpoint.step_of(name) not in staying]
    mirror.remote.remove(*sorted(gone, key=lambda name: not name.endswith(MANIFEST)))


def _listed(mirror: Mirror, run_dir: Path) -> tuple[list[str], dict[int, str]]:
    """The names of all files of checkpoints at the URL, and of the manifests by step."""
    there = [name for name in mirror.remote.names(mirror.name(checkpoint.folder(run_dir))) if "/step_" in name]
    return there, {checkpoint.step_of(name): name for name in there if name.endswith(f"/{MANIFEST}")}


def _newest_there(mirror: Mirror, run_dir: Path) -> dict[str, Any] | None:
    """The state of the newest whole checkpoint at the URL, which is then the only one here; None if there is none."""
    _, manifests = _listed(mirror, run_dir)
    mistakes: list[str] = []
    for step in sorted(manifests, reverse=True):
        try:
            return checkpoint.read(_pull(mirror, run_dir, step))
        except checkpoint.DamagedError as error:
            log.warning("%s", error)
            mistakes += error.messages
    _pull(mirror, run_dir, None)
    if mistakes:
        where = f"{mirror.remote.url}/{mirror.name(checkpoint.folder(run_dir))}"
        raise ConfigError(*mistakes, f"no checkpoint there is whole: remove {where} to start again")
    return None


def _pull(mirror: Mirror, run_dir: Path, step: int | None) -> Path:
    """Have the checkpoint of a step as it is at the URL, and no other. Raises DamagedError where it is not whole."""
    path = _path(run_dir, step or 0)
    name = mirror.name(path)
    manifest = None if step is None else mirror.remote.read(f"{name}/{MANIFEST}")
    same = manifest is not None and _is_of(manifest, path / STATE)
    for other in (*path.parent.glob("step_*"), *path.parent.glob(".step_*")):
        if other != path or not same:
            shutil.rmtree(other)
    if step is None:
        return path
    if manifest is None:
        raise checkpoint.DamagedError(f"checkpoint {mirror.remote.url}/{name}: {MANIFEST} is missing")
    staging = path if same else path.with_name(f".{path.name}.{os.getpid()}")
    staging.mkdir(parents=True, exist_ok=True)
    if not same:
        try:
            with atomic.replacing(staging / STATE) as part:
                mirror.remote.get(f"{name}/{STATE}", part)
        except FileNotFoundError:
            raise checkpoint.DamagedError(f"checkpoint {mirror.remote.url}/{name}: {STATE} is missing") from None
    checkpoint.write_manifest(staging, manifest)  # figures may have been added
    return staging.rename(path)


def _is_of(manifest: bytes, state: Path) -> bool:
    try:
        return state.is_file() and json.loads(manifest)["sha256"] == checkpoint.sha256(state)
    except (ValueError, KeyError):
        return False


def _path(run_dir: Path, step: int) -> Path:
    return checkpoint.folder(run_dir) / f"step_{step:08d}"


def _only(run_dir: Path) -> int | None:
    """The step of the one checkpoint there is here."""
    return next((checkpoint.step_of(path.name) for path in checkpoint.folder(run_dir).glob("step_*")), None)
