"""A run folder that is there already, at a path or a URL: its config, its method as trained, and what of it is needed
on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distssl import atomic, checkpoint, collectives, config, method, mirror, mirrored, stores, weights
from distssl.config import Machine, Run
from distssl.context import Context
from distssl.downstream import rows
from distssl.errors import ConfigError
from distssl.mirror import Mirror
from distssl.nn.backbones import Backbone
from distssl.weights import Weights

CONFIG = "config.yaml"
LOCK = ".training.lock"  # of the process that trains in the folder
DYING_S = 120.0  # that a killed process may take to end; a file server notes the death of a host after 90
COPIES = "copies"  # in the cache: apart from the working copies of runs that train


@dataclass(frozen=True)
class Found:
    """place: as the user names it. folder: that path, or the copy of what lies at that URL."""

    place: str
    folder: Path
    run: Run


@contextmanager
def alone(run: Run, patience_s: float = 0.0) -> Iterator[None]:
    """Be the one process that changes a run's folder, or this node's working copy of it, while the block runs.

    Raises ConfigError where another is that for longer than `patience_s`.
    """
    atomic.make_folder(run.run_dir)
    taken = (
        f"{run.run_url or run.run_dir}: another process trains this run, or is ending since its command was killed; "
        "stop that one, or say name=ANOTHER"
    )
    with atomic.held(run.run_dir / LOCK, patience_s, taken):
        yield


@contextmanager
def trained_in(run: Run, context: Context) -> Iterator[None]:
    """The folder is this start's while the block runs: rank 0 holds its lock.

    Of one at a URL that is a working copy, as it is there, and what comes to it is put there by rank 0. Every rank
    enters it. Raises ConfigError on all where another process trains the run.
    """
    with ExitStack() as locks:
        lock = alone(run, DYING_S)
        collectives.together(lambda: locks.enter_context(lock) if context.rank == 0 else None)
        if run.run_url is None:
            yield
            return
        context.mirror = remote = Mirror(context.run_dir, run.run_url)
        collectives.together(lambda: _take(remote) if context.rank == 0 else None)
        with remote.pushing() if context.rank == 0 else nullcontext():
            yield


def _take(remote: Mirror) -> None:
    """The records as they are at the URL: an earlier start on this node may have been of another run."""
    for folder in mirror.RECORDS:
        remote.pull(folder, exactly=True)


def find(place: str | Path, overrides: Sequence[str] = ()) -> Found:
    """The run at a path or URL, its config with key=value overrides. Raises ConfigError where there is none."""
    place = str(place)
    if stores.is_url(place):
        return _find_there(place, overrides)
    folder = stores.local(place).resolve()
    _require(place, (folder / CONFIG).exists())
    # Where it lies now: it may have been moved, or taken from a URL by hand.
    own = f"machine.storage={json.dumps(str(folder.parent))}"
    run = config.load(folder / CONFIG, [own, *overrides], method.options)
    return Found(place, folder, run)


def _find_there(place: str, overrides: Sequence[str]) -> Found:
    try:
        place = stores.checked(place)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None
    storage, _, name = place.rpartition("/")
    cache = _cache(overrides)
    folder = mirror.working_copy(storage, name, cache / COPIES)
    atomic.make_folder(folder)
    with atomic.locked(folder):  # the ranks of a node come at the same time
        (folder / CONFIG).unlink(missing_ok=True)
        Mirror(folder, place).pull_file(CONFIG)
        _require(place, (folder / CONFIG).exists())
        here = {"machine.storage": storage, "name": name, "machine.cache": str(cache)}
        own = [f"{key}={json.dumps(value)}" for key, value in here.items()]
        return Found(place, folder, config.load(folder / CONFIG, [*own, *overrides], method.options))


def _require(place: str, is_there: bool) -> None:
    if not is_there:
        raise ConfigError(f"{place}: no run there; a run folder with {CONFIG} is right")


def _cache(overrides: Sequence[str]) -> Path:
    """This machine's cache: the run's config has that of another."""
    said = [text.partition("=")[2] for text in overrides if text.startswith("machine.cache=")]
    return Machine.model_validate({"cache": yaml.safe_load(said[-1])} if said else {}).cache


def beside(place: str) -> Path:
    """The folder that a run lies in; for one at a URL the one that the user is in."""
    return Path.cwd() if stores.is_url(place) else Path(place).resolve().parent


def with_records(places: Sequence[str]) -> list[Path]:
    """Folders of runs with their figures, curves and pictures, of which copies are made where they lie at URLs."""
    return [_with_records(place) if stores.is_url(place) else Path(place) for place in places]


def _with_records(place: str) -> Path:
    found = find(place)
    copy = _mirror(found)
    assert copy is not None
    with atomic.locked(found.folder):
        for folder in mirror.RECORDS:
            copy.pull(folder, exactly=True)
    return found.folder


def require_on_every_host(found: Found) -> None:
    """Raise ConfigError where a host does not see the folder of a run at a path. Every rank calls it."""
    seen = found.run.run_url is not None or (found.folder / CONFIG).exists()
    if not all(collectives.gather_objects(seen)):
        raise ConfigError(f"{found.place}: not every host sees it; a folder that all of them mount, or a URL, is right")


def take_figures(found: Found) -> None:
    """Have the figures that others have put into the run's folder."""
    if copy := _mirror(found):
        copy.pull_file(rows.SUMMARY)


def _mirror(found: Found) -> Mirror | None:
    return Mirror(found.folder, found.run.run_url) if found.run.run_url else None


def with_checkpoint(place: str | Path) -> Found:
    """A run with its newest whole checkpoint and its figures in the folder."""
    found = find(place)
    take_figures(found)
    copy = _mirror(found)
    if copy:
        mirrored.pull_newest(copy, found.folder)
    return found


def trained(run: Run, run_dir: Path) -> method.Method:
    """The method as the newest checkpoint in a run folder has it. Raises ConfigError where there is none."""
    return restored(run, run_dir)[0]


def restored(run: Run, run_dir: Path) -> tuple[method.Method, dict[str, Any]]:
    """`trained`, and the checkpoint's state."""
    state = checkpoint.newest(run_dir)
    built = at(state, run, run_dir)
    assert state is not None
    return built, state


def at(state: dict[str, Any] | None, run: Run, where: Path | str) -> method.Method:
    """The method as a checkpoint of the run at `where` has it. Raises ConfigError where there is none."""
    if state is None:
        raise ConfigError(f"{where}: no checkpoint yet")
    there = config.parse(state["config"], where)
    changed = config.differences(there, starting_from(run, there.model.init_sha256))  # what it started from is past
    wrong = [line for line in changed if line.startswith(("model.", "method."))]
    if wrong:
        raise ConfigError(*(f"{where}: {line}; the checkpoint's is right" for line in wrong))
    built = method.build(run)
    built.load_state_dict(state["model"])
    return built


def weights_at(place: str) -> Weights:
    """The backbone of a run's newest checkpoint, or in a file of the format safetensors.

    Raises ConfigError where there is none. No rank waits for another.
    """
    if not stores.is_url(place):
        path = stores.local(place)
        if not path.exists():
            raise ConfigError(f"{place}: not there; a run folder or a file of `export --format safetensors` is right")
        if path.is_file():
            return weights.read(path)
    found = with_checkpoint(place)
    backbone = trained(found.run, found.folder).evaluated()
    while isinstance(backbone.net, Backbone):  # behind something that only its method needs
        backbone = backbone.net
    return Weights.of(backbone, found.run.model)


def start_of(run: Run, there: Run | None) -> tuple[Run, Weights | None]:
    """The run with the digest of the weights it starts from, and those; None: random ones, or only the folder has them.

    Raises ConfigError where the weights are not there, or not those that the config wants.
    """
    wanted, init = run.model.init_sha256, run.model.init
    if init is None:
        if wanted:
            raise ConfigError(f"model.init_sha256={wanted}: says which weights model.init must have; name those too")
        return run, None
    try:
        start = weights_at(init)
    except ConfigError as error:
        if there is None or there.model.init != init:
            raise ConfigError(*(f"model.init: {message}" for message in error.messages)) from None
        return starting_from(run, wanted or there.model.init_sha256), None
    if wanted not in (None, start.sha256):
        raise ConfigError(f"model.init_sha256={wanted}: the weights at model.init={init} have {start.sha256}")
    return starting_from(run, start.sha256), start


def starting_from(run: Run, sha256: str | None) -> Run:
    """The run whose weights at model.init have this digest."""
    return run.model_copy(update={"model": run.model.model_copy(update={"init_sha256": sha256})})


def give_back(found: Found, folder: Path) -> None:
    """Put the files of a folder in the run's to where the run lies, if that is a URL."""
    copy = _mirror(found)
    if copy and folder.is_relative_to(found.folder):
        copy.push(copy.name(folder))
