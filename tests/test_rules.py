"""What the code must look like, as far as a program can see it; `make check` runs this file."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from distssl import config, method, settings, sweep

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "distssl").rglob("*.py"))
CONFIGS = [ROOT / "configs/default.yaml", *sorted((ROOT / "configs/pretrain").glob("*.yaml"))]

SWEEPS = sorted((ROOT / "configs/sweep").glob("*.yaml"))

# Data-flow order: a module imports only from its own level and those before it.
LEVELS = [
    ["errors"],
    ["atomic", "background", "settings", "stores"],
    ["remote"],
    ["mirror"],
    ["config"],
    ["collectives"],
    ["context"],
    ["data"],
    ["nn"],
    ["weights"],
    ["methods", "method"],
    ["plan", "window", "lookout", "guard", "monitor", "checkpoint"],
    ["mirrored"],
    ["streams"],
    ["downstream"],
    ["epoch_start"],
    ["train"],
    ["run_folder"],
    ["job", "verify"],
    ["estimate", "prices"],
    ["capacity"],
    ["exchange"],
    ["calibrate"],
    ["sweep", "model_card", "export"],
    ["progress", "report", "svg"],
    ["compare", "forecast"],
    ["page", "board", "terminal"],
    ["on_ray"],
]
DATA = [
    ["images", "locations"],
    ["transfer"],
    ["tar_cache", "ranged", "expansion"],
    ["fetching"],
    ["remote"],
    ["store"],
    ["probe", "digits", "catalogue", "annotations"],
    ["files"],
    ["sources", "tars"],
    ["index_parts"],
    ["indexing"],
    ["dataset", "packing"],
    ["shards"],
    ["draws"],
    ["order", "balanced_order", "held_out", "sample", "quarantine"],
    ["augment", "windows"],
    ["pixels", "patches", "randaugment", "corruptions"],
    ["graph"],
    ["loader"],
]


def imported(path: Path) -> set[str]:
    """The distssl modules a file names in its imports, anywhere in it, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("distssl.")}


def level(levels: list[list[str]], name: str) -> int:
    return next(number for number, names in enumerate(levels) if name in names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_above_it(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    if parts == ("__init__",):
        assert not imported(path)
        return
    for name in imported(path):
        other = name.split(".")[1:]
        if other[0] != parts[0]:
            assert level(LEVELS, other[0]) <= level(LEVELS, parts[0]), f"{path.name} imports {name}"
        elif parts[0] == "data" and parts[1] != "__init__":
            assert level(DATA, other[1]) < level(DATA, parts[1]), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_at_most_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_config_loads_and_builds(path: Path) -> None:
    run = config.load(path, [], method.options)
    assert method.build(run).backbone.num_features > 0


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_sweep_loads_and_what_it_changes_are_keys_of_a_run(path: Path) -> None:
    """As far as it can be known without its runs."""
    swept = sweep.parse(settings.read(path, []))
    for point in sweep.corners(swept):
        changes = [f"{key}={json.dumps(value)}" for key, value in point.items() if key not in sweep.OWN_KEYS]
        config.load(CONFIGS[0], [*swept.overrides, *changes], method.options)


def test_every_config_is_of_a_kind_that_is_tested() -> None:
    assert set(CONFIGS) | set(SWEEPS) == set((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("distssl", ("ray", "torch", "nvidia.dali")),
        ("distssl.on_ray.command_line", ("ray", "torch")),
        ("distssl.on_ray.commands", ("torch", "ray.train")),
    ],
)
def test_importing_is_cheap(module: str, heavy: tuple[str, ...]) -> None:
    program = f"import sys, {module}; sys.exit(any(name in sys.modules for name in {heavy}))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
