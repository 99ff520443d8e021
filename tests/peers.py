"""lightly, a library of the same losses, for comparisons; its version is pinned, as tests say where it errs."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType


def lightly(name: str) -> ModuleType:
    """The module lightly.NAME; importing it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"lightly.{name}")
