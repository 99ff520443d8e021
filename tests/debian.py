"""Debian packages that tests need, installed where this is Debian and root's; one process at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

LOCK = Path(tempfile.gettempdir()) / "distssl-tests-apt.lock"
APT = ("apt-get", "-o", "DPkg::Lock::Timeout=200")
ENVIRONMENT = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # no service is to start


def install(packages: Sequence[str]) -> str | None:
    """Those that are not there yet; why that cannot be, or None."""
    with open(LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        needed = [name for name in packages if subprocess.run(["dpkg", "-s", name], capture_output=True).returncode]
        if not needed:
            return None
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            return f"needs {', '.join(needed)}, which root alone can install, and on Debian"
        for command in (["update"], ["install", "-y", "--no-install-recommends", *needed]):
            done = subprocess.run([*APT, *command], env=os.environ | ENVIRONMENT, capture_output=True, check=False)
            if done.returncode:
                return f"needs {', '.join(needed)}: {done.stderr.decode().strip().splitlines()[-1]}"
    return None
