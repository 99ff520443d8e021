"""The two ways a run ends badly: the user's input is wrong, or the run failed; and what others' errors say."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """The user's input is wrong: exit code 2. Each message names the key, its value and what would be right."""

    def __init__(self, *messages: str) -> None:
        self.messages: Sequence[str] = messages
        super().__init__("\n".join(messages))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, ...]]:
        return type(self), tuple(self.messages)


class RunError(RuntimeError):
    """The run failed for a reason that can be said in one line: exit code 1."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def last_line(error: BaseException) -> str:
    """What an error says at its end: Ray puts a traceback before it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
