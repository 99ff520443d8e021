"""The actor itself, apart from `desk`: its process has no use for torch, whose import takes seconds and memory."""

from __future__ import annotations

from typing import Any


class Desk:
    """Outcomes of workers, lines of metrics, and whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self._outcomes: dict[int, dict[str, Any]] = {}
        self._records: list[str] = []
        self._stop = False

    def tell(self, rank: int, outcome: dict[str, Any]) -> None:
        self._outcomes[rank] = outcome

    def outcomes(self) -> list[dict[str, Any]]:
        """What the workers told, in the order of their ranks."""
        return [self._outcomes[rank] for rank in sorted(self._outcomes)]

    def note(self, record: str) -> None:
        """A line of metrics, as JSON."""
        self._records.append(record)

    def take(self) -> list[str]:
        """The lines noted since the last call."""
        records, self._records = self._records, []
        return records

    def ask_to_stop(self) -> None:
        self._stop = True

    def stop_asked(self) -> bool:
        return self._stop
