"""torchvision's data sets by name: `cifar10`, `cifar10:test`, `stl10:unlabeled`, ..."""

from __future__ import annotations

import difflib
import inspect
import io
import logging
from pathlib import Path
from typing import Any

from PIL import Image

from distssl.data import images
from distssl.errors import ConfigError, first_line

log = logging.getLogger(__name__)

NO_IMAGES = ("kinetics", "movingmnist", "sbu", "lfwpairs", "visiondataset", "sbdataset")  # videos, pairs, bare classes
SAMPLED = 16  # items encoded to estimate how much disk a data set needs


def find(name: str) -> type | None:
    """torchvision's class of that name in any case, or None; only those that can be made from a folder and a split."""
    return _classes().get(name.lower())


def suggestion(name: str, also: list[str]) -> str:
    """What is possible, the nearest name first."""
    names = sorted([*also, *_classes()])
    near = difflib.get_close_matches(name.lower(), names, n=1)
    return (f"Did you mean {near[0]}? " if near else "") + f"Possible: a folder, zip, CSV, tars, or {', '.join(names)}"


def load(source: str, downloads: Path, *, key: str) -> Any:
    """The data set `NAME[:SPLIT]`, downloaded into `downloads` where it is not there. Raises ConfigError.

    For a caller that holds `atomic.locked(downloads)`.
    """
    name, _, split = source.partition(":")
    found = find(name)
    assert found is not None
    options = _options(found, split, f"{key}={source}")
    if "download" in options:
        log.info("%s: looking in %s, downloading what is missing", source, downloads)
    try:
        return found(root=str(downloads), **options)
    except ValueError as error:  # torchvision's own check of the split's name
        raise ConfigError(f"{key}={source}: {first_line(error)[:200]}") from error
    except (OSError, RuntimeError, EOFError, ImportError) as error:
        raise ConfigError(
            f"{key}={source}: could not be downloaded ({first_line(error)[:200]}). Without a network, put "
            f"torchvision's files for {found.__name__} into {downloads}, or give a folder, zip, CSV or tars instead"
        ) from error


def item(data: Any, i: int) -> tuple[bytes, int]:
    """Item i as an encoded image (the original file where torchvision has one, else PNG) and its class, -1 for none.

    Raises images.ImageError.
    """
    try:
        picture, target = data[i][:2]
    except OSError as error:  # PIL's UnidentifiedImageError is one
        raise images.ImageError(f"cannot be read: {first_line(error)[:200]}") from error
    label = int(target) if hasattr(target, "__index__") or getattr(target, "ndim", 1) == 0 else -1
    if isinstance(picture, bytes):
        return picture, label
    if not isinstance(picture, Image.Image):
        raise images.ImageError(f"is a {type(picture).__name__}, not an image")
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        picture = picture.convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue(), label


def mean_bytes(data: Any) -> int:
    """Estimated bytes of an encoded item."""
    if not len(data):
        return 0
    sizes: list[int] = []
    for i in range(0, len(data), max(1, len(data) // SAMPLED)):
        try:
            sizes.append(len(item(data, i)[0]))
        except images.ImageError:
            continue
    return sum(sizes) // max(1, len(sizes))


def _classes() -> dict[str, type]:
    from torchvision import datasets  # seconds to import, and most sources need none of it

    found: dict[str, type] = {}
    for name in datasets.__all__:
        parameters = inspect.signature(getattr(datasets, name)).parameters
        needed = [
            key for key, value in parameters.items() if value.default is value.empty and value.kind != value.VAR_KEYWORD
        ]
        if needed == ["root"] and "download" in parameters and name.lower() not in NO_IMAGES:
            found[name.lower()] = getattr(datasets, name)
    return found


def _options(found: type, split: str, title: str) -> dict[str, Any]:
    parameters = inspect.signature(found).parameters
    options: dict[str, Any] = {"download": True}
    if "loader" in parameters:
        options["loader"] = lambda path: Path(path).read_bytes()  # the file as it is, not decoded and encoded again
    switch = next((name for name in ("split", "image_set") if name in parameters), None)
    if not split:
        return options  # the data set's own default: its training part
    if switch is not None:
        options[switch] = (
            parameters[switch].default if split == "train" and _has_other_train(parameters[switch]) else split
        )
    elif "train" in parameters and split in ("train", "test"):
        options["train"] = split == "train"
    else:
        raise ConfigError(f"{title}: this data set has no split {split!r}" + _splits(parameters))
    return options


def _has_other_train(parameter: inspect.Parameter) -> bool:
    return str(parameter.default).startswith("train")  # "trainval", "train-standard": what its authors train on


def _splits(parameters: Any) -> str:
    return "; there are train and test" if "train" in parameters else "; give its name alone"
