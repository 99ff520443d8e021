"""YAML files with key=value overrides as trees of plain data, and a schema's complaints as lines for the user."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel

from distssl.errors import ConfigError


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    if not 0 < low <= high < math.inf:
        raise ValueError("two numbers above 0, the lower first, are right")
    return ends


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]  # of sizes that are drawn, both ends above 0


def read(file: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """A file's tree with overrides. Raises ConfigError with a line for each mistake."""
    tree = read_file(file)
    mistakes = override(tree, overrides)
    if mistakes:
        raise ConfigError(*mistakes)
    return tree


def override(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set each key=value in the tree; what is wrong with them."""
    return [mistake for text in overrides for mistake in _override(tree, text)]


def read_file(file: Path, option: str = "--config") -> dict[str, Any]:
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{option} {file}: {error.strerror}; a YAML file is right") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{option} {file}: is not UTF-8 text; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} {file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{option} {file}: holds {type(tree).__name__}; a mapping of sections is right")
    return tree


def read_extending(file: Path, option: str, above: Sequence[Path] = ()) -> dict[str, Any]:
    """A file's tree, laid over that of the file it says it `extends`, and so on: mappings merged, lists replaced.

    above: the files that extend it. Raises ConfigError as `read_file`, and where it is one of them.
    """
    if file.resolve() in above:
        raise ConfigError(f"{option} {file}: extends itself; another file, or no `extends`, is right")
    tree = read_file(file, option)
    below = tree.pop("extends", None)
    if not below:
        return tree
    return _over(read_extending(file.parent / str(below), option, [*above, file.resolve()]), tree)


def _over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), dict)
        merged[key] = _over(merged[key], value) if both else copy.deepcopy(value)
    return merged


def _override(tree: dict[str, Any], override: str) -> list[str]:
    """Set one key=value in the tree; what is wrong with it."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        return [f"{override!r}: key=value is right, for example train.epochs=20"]
    *sections, leaf = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            return [f"{override!r}: {section} is a value and has no keys"]
    try:
        tree[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        return [f"{override!r}: the value is not YAML"]
    return []


def explain(schema: type[BaseModel], item: Mapping[str, Any], prefix: str = "") -> str:
    """One pydantic error as one line: key, value, what would be right."""
    path = [str(part) for part in item["loc"]]
    key = ".".join([prefix, *path] if prefix else path)
    if item["type"] == "extra_forbidden":
        names = _names_at(schema, path[:-1])
        near = difflib.get_close_matches(path[-1], names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(names))}"
        return f"{key}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{key}: missing; say {key}=VALUE"
    return f"{key}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def _names_at(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys a section knows."""
    for part in path:
        field = schema.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        schema = field.annotation
    return list(schema.model_fields)
