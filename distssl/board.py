"""A comparison as one TensorBoard folder: curves of all runs, HParams, label efficiency, pictures, the projector.

`training/RUN` holds links to the run's own event files, so that a run which goes on is followed. `evaluation/RUN` is
written here, and so are `baselines/random` and `baselines/supervised`. Links, because the projector looks for its files
below a single --logdir.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from distssl import atomic, compare
from distssl.compare import Column, Comparison, Line, Member
from distssl.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

NUM_PROJECTED = 500
EVENTS = "events.out.tfevents.*"
TRAINING, EVALUATION, BASELINES = "training", "evaluation", "baselines"  # folders
MARK = ".made-by-compare"  # says that the folder may be made anew


def write(comparison: Comparison, folder: Path) -> None:
    """Make the folder anew. Raises ConfigError where it holds what was not made here."""
    _clear(folder)
    for member in comparison.members:
        links = folder / TRAINING / member.name
        links.mkdir(parents=True)
        for events in sorted(member.folder.glob(EVENTS)):
            (links / events.name).symlink_to(os.path.relpath(events, links))
    _write_experiment(comparison, folder / EVALUATION)
    settings = _settings(comparison)
    lines = {line.name: line for line in comparison.lines if line.backbone == "pretrained"}
    for i, member in enumerate(comparison.members):
        with _writer(folder / EVALUATION / member.name) as writer:
            _write_session(writer, {name: values[i] for name, values in settings.items()})
            _write_figures(writer, lines[member.name])
            _write_pictures(writer, member)
    for line in comparison.lines:
        if line.backbone != "pretrained":
            with _writer(folder / BASELINES / line.name) as writer:
                _write_figures(writer, line)


def tag(column: Column) -> str:
    """A figure's name in TensorBoard."""
    return _plain(f"{column.data or 'data'}/{column.task}_{column.metric}_{column.amount.replace('/', '_per_')}_labels")


def _plain(name: str) -> str:
    return re.sub(r"[^\w./-]", "_", name)


def _clear(folder: Path) -> None:
    if folder.exists() and not (folder / MARK).exists() and any(folder.iterdir()):
        raise ConfigError(f"--out: {folder} holds files of something else; another folder is right")
    if folder.exists():
        shutil.rmtree(folder)  # of links it takes the links
    atomic.make_folder(folder)
    (folder / MARK).touch()


def _settings(comparison: Comparison) -> dict[str, list[Any]]:
    """Values that HParams can show, of one type a key: text where they are of several."""
    found: dict[str, list[Any]] = {}
    for key, values in comparison.settings.items():
        plain = len({type(value) for value in values}) == 1 and isinstance(values[0], bool | int | float | str)
        found[key] = values if plain else [compare.setting(value) for value in values]
    return found


def _writer(folder: Path) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def _write_experiment(comparison: Comparison, folder: Path) -> None:
    """The columns of HParams: of several such records TensorBoard reads one, so all of it stands in this one."""
    from torch.utils.tensorboard.summary import hparams

    settings = {key: values[0] for key, values in _settings(comparison).items()}
    metrics = {tag(column): 0.0 for column in comparison.columns}
    with _writer(folder) as writer:
        experiment, _, _ = hparams(settings, metrics)
        writer._get_file_writer().add_summary(experiment)


def _write_session(writer: SummaryWriter, settings: dict[str, Any]) -> None:
    """A row of HParams."""
    from torch.utils.tensorboard.summary import hparams

    _, start, end = hparams(settings, {})
    for summary in (start, end):
        writer._get_file_writer().add_summary(summary)


def _write_figures(writer: SummaryWriter, line: Line) -> None:
    """Each as a point, and those of some labels again with their number as the step."""
    for column, row in sorted(line.cells.items(), key=lambda item: item[0].labels or 0):
        writer.add_scalar(tag(column), row.value, 0)
        if column.labels is not None:
            name = _plain(f"label_efficiency/{column.data}_{column.task}_{column.metric}")
            writer.add_scalar(name, row.value, column.labels)


def _write_pictures(writer: SummaryWriter, member: Member) -> None:
    for picture in member.pictures:
        with Image.open(picture) as image:
            writer.add_image(f"pictures/{picture.stem}", np.asarray(image.convert("RGB")), dataformats="HWC")
    if member.projector.exists():
        _project(writer, member.projector)


def _project(writer: SummaryWriter, path: Path) -> None:
    """Features with thumbnails; the labels by name where the file has names."""
    import torch

    with np.load(path) as file:
        x, labels, thumbnails = (file[name][:NUM_PROJECTED] for name in ("x", "labels", "thumbnails"))
        classes = [str(name) for name in file["classes"]] if "classes" in file else []
    names = [classes[label] if 0 <= label < len(classes) else str(label) for label in labels]
    images = torch.from_numpy(thumbnails).permute(0, 3, 1, 2) / 255  # [n, 3, 32, 32]
    writer.add_embedding(x, metadata=[" ".join(name.split()) for name in names], label_img=images, tag="features")
