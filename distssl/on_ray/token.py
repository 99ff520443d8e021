"""The token with which Ray's clusters know this user. Imports no Ray, which looks for it when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FILE = Path("~/.ray/auth_token")


def prepare() -> None:
    """Have this process speak with clusters by the token, made by Ray's command where there is none."""
    os.environ["RAY_AUTH_MODE"] = "token"
    if not FILE.expanduser().exists():
        ray = Path(sys.executable).parent / "ray"
        subprocess.run([ray, "get-auth-token", "--generate"], check=True, capture_output=True)
