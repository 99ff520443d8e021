"""A user of the command line in a network of hosts: commands as they would type them, in the foreground or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


class Command:
    """A command of launch.py that runs."""

    def __init__(
        self, arguments: tuple[object, ...], environment: Mapping[str, str], log: Path, code: Path = ROOT
    ) -> None:
        self.log = log
        with open(log, "wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "launch.py", *map(str, arguments)],
                cwd=code,
                env=dict(environment),
                stdout=said,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, condition: Callable[[str], bool], what: str, within_s: float) -> None:
        """Until what it says is so, or what we look at meanwhile."""
        wait(lambda: condition(self.said), f"{what}; it said:\n", within_s, lambda: self.said, self.process)

    def end(self, within_s: float) -> int:
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not done within {within_s} s; it said:\n{self.said}") from None

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """kill -9 of the client and of its tunnel, as when the laptop dies."""
        if self.process.poll() is None:
            for pid in _children(self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()


class User:
    """code: where their launch.py lies."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder
        self.code = ROOT
        self.commands: list[Command] = []

    def start(self, *arguments: object) -> Command:
        log = self.folder / f"command{len(self.commands)}.log"
        command = Command(arguments, self.environment, log, self.code)
        self.commands.append(command)
        return command

    def run(self, *arguments: object, within_s: float = 240) -> tuple[int, str]:
        """Exit code and what it said."""
        command = self.start(*arguments)
        return command.end(within_s), command.said

    def close(self) -> None:
        for command in self.commands:
            command.kill()


def wait(
    condition: Callable[[], bool],
    what: str,
    within_s: float,
    said: Callable[[], str] = str,
    process: subprocess.Popen[bytes] | None = None,
) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert process is None or process.poll() is None, f"ended before {what}{said()}"
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}{said()}"
        time.sleep(0.5)


def _children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [below for child in map(int, found) for below in (*_children(child), child)]
