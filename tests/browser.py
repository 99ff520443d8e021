"""Headless Chromium for tests: opens a page, reads what it shows and takes its picture.

It is driven by the Chrome DevTools Protocol over two pipes, file descriptors 3 (commands) and 4 (answers), each message
ended by a zero byte. Where it is not installed and this is root's, apt-get installs it.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests import debian

# Elements by a CSS selector, of shadow roots and frames too.
EVERY = """
function every(selector, root = document) {
  const found = [...root.querySelectorAll(selector)];
  for (const element of root.querySelectorAll("*")) {
    const inner = element.shadowRoot ?? element.contentDocument;
    if (inner) found.push(...every(selector, inner));
  }
  return found;
}
"""


class PageLeftError(Exception):
    """What was asked of a page that is being left for another."""


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._numbers = itertools.count(1)
        self._read = b""
        self._session: str | None = None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def open(self, url: str) -> None:
        self._ask("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """A JavaScript expression's value; `every(selector)` looks into shadow roots and frames."""
        found = self._ask("Runtime.evaluate", expression=f"{EVERY};({expression})", returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 60) -> Any:
        """The value of an expression once it is true, also of a page that comes after this one."""
        until = time.monotonic() + timeout_s
        while True:
            with suppress(PageLeftError):
                if value := self.evaluate(expression):
                    return value
            assert time.monotonic() < until, f"{expression}: not within {timeout_s} s"
            time.sleep(0.2)

    def type(self, selector: str, text: str) -> None:
        """Type into the one field of that selector, in place of what it holds."""
        self.evaluate(f"(([field]) => {{ field.focus(); field.select(); }})(every({json.dumps(selector)}))")
        self._ask("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot")["data"]))

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == number:
                if "navigated" in answer.get("error", {}).get("message", ""):
                    raise PageLeftError(method)
                assert "error" not in answer, answer
                return answer["result"]

    def _message(self, timeout_s: float = 60) -> bytes:
        while b"\0" not in self._read:
            assert select.select([self._answers], [], [], timeout_s)[0], "the browser does not answer"
            data = os.read(self._answers, 1 << 16)
            assert data, "the browser has gone"
            self._read += data
        message, _, self._read = self._read.partition(b"\0")
        return message


@contextmanager
def started(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile folder; skips the test where there is none and none can be installed."""
    program = installed()
    commands_out, commands_in = os.pipe()
    answers_out, answers_in = os.pipe()
    flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1400,1000 --remote-debugging-pipe"
    line = [program, *flags.split(), f"--user-data-dir={profile}"]
    shell = ["bash", "-c", f'exec "$@" 3<&{commands_out} 4>&{answers_in}', "bash", *line]
    with open(profile.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(shell, pass_fds=[commands_out, answers_in], stdout=log, stderr=log)
    os.close(commands_out)
    os.close(answers_in)
    try:
        yield Browser(commands_in, answers_out)
    finally:
        os.close(commands_in)  # it ends itself when nobody commands it
        process.wait(timeout=30)
        os.close(answers_out)


def installed() -> str:
    """The program; skips as `started` does."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None and (reason := debian.install(["chromium"])):
        pytest.skip(reason)
    return found or "chromium"
