"""CONTRIBUTING.md followed literally: the files of its new method, as they stand there, make one that holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("distssl", "tests", "configs", "launch.py", "pyproject.toml")
FILE = re.compile(r"`([\w/]+\.(?:py|yaml))`[^`]*?```(?:python|yaml)\n(.*?)```", re.DOTALL)


def test_a_method_is_added_by_the_files_that_contributing_shows(tmp_path: Path) -> None:
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    written = dict(FILE.findall((ROOT / "CONTRIBUTING.md").read_text()))
    assert sorted(written) == [
        "configs/pretrain/align_uniform.yaml",
        "distssl/methods/align_uniform.py",
        "tests/methods/test_align_uniform.py",
    ]
    for name, text in written.items():
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(text)
    its_own = ["tests/methods/test_align_uniform.py", "tests/test_rules.py", "tests/data/test_graph.py"]
    everyones = ["tests/methods/test_contract.py", "tests/test_verify.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", "align_uniform", *its_own, *everyones],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 14, done.stdout
