"""A run folder that is there already, at a path or a URL: its config, and what of it is needed on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from distssl import atomic, config, job, method, mirror, mirrored, stores
from distssl.config import Machine, Run
from distssl.context import Context
from distssl.downstream import rows
from distssl.errors import ConfigError
from distssl.mirror import Mirror

COPIES = "copies"  # in the cache: apart from the working copies of runs that train


@dataclass(frozen=True)
class Found:
    """place: as the user names it. folder: that path, or the copy of what lies at that URL."""

    place: str
    folder: Path
    run: Run


def find(place: str | Path, overrides: Sequence[str] = ()) -> Found:
    """The run at a path or URL, its config with key=value overrides. Raises ConfigError where there is none."""
    place = str(place)
    if stores.is_url(place):
        return _find_there(place, overrides)
    folder = Path(place).expanduser().resolve()
    _require(place, (folder / job.CONFIG).exists())
    # Where it lies now: it may have been moved, or taken from a URL by hand.
    own = f"machine.storage={json.dumps(str(folder.parent))}"
    run = config.load(folder / job.CONFIG, [own, *overrides], method.options)
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
        (folder / job.CONFIG).unlink(missing_ok=True)
        Mirror(folder, place).pull_file(job.CONFIG)
        _require(place, (folder / job.CONFIG).exists())
        here = {"machine.storage": storage, "name": name, "machine.cache": str(cache)}
        own = [f"{key}={json.dumps(value)}" for key, value in here.items()]
        return Found(place, folder, config.load(folder / job.CONFIG, [*own, *overrides], method.options))


def _require(place: str, is_there: bool) -> None:
    if not is_there:
        raise ConfigError(f"{place}: no run there; a run folder with {job.CONFIG} is right")


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


def _mirror(found: Found) -> Mirror | None:
    return Mirror(found.folder, found.run.run_url) if found.run.run_url else None


def with_checkpoint(place: str | Path) -> Found:
    """A run with its newest whole checkpoint and its figures in the folder."""
    found = find(place)
    with Context(found.folder) as context:
        context.mirror = _mirror(found)
        if context.mirror:
            context.mirror.pull_file(rows.SUMMARY)
            mirrored.newest(context, found.folder)
    return found


def give_back(found: Found, folder: Path) -> None:
    """Put the files of a folder in the run's to where the run lies, if that is a URL."""
    copy = _mirror(found)
    if copy and folder.is_relative_to(found.folder):
        copy.push(copy.name(folder))
