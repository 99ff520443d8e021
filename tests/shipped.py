"""The files of cluster/ with something in place of all that is to be filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distssl import settings
from distssl.capacity import PLACEHOLDER

FOLDER = Path(__file__).parent.parent / "cluster"
VALUES = {"FILL_IN_NUMBER": 4, "FILL_IN_YOUR_ADDRESS/32": "192.0.2.7/32"}


def tree(name: str, **above: Any) -> dict[str, Any]:
    """Of a file and what it extends, with `above` laid over it as a file of the user's own would be."""
    return settings._over(filled(settings.read_extending(FOLDER / f"{name}.yaml", "--cluster")), above)


def head(name: str) -> str:
    """What a file says before its first line that is none of the comment, in one line."""
    lines = (FOLDER / name).read_text().splitlines()
    return " ".join(line.lstrip("#!").strip() for line in lines if line.startswith("#") and "SBATCH" not in line)


def filled(value: Any) -> Any:
    """A tree with something in place of all that is to be filled in."""
    if isinstance(value, dict):
        return {key: filled(one) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one) for one in value]
    if isinstance(value, str) and PLACEHOLDER in value:
        return VALUES.get(value, value.replace(PLACEHOLDER, "given"))
    return value
