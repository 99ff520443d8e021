"""The actor itself, apart from `desk`: its process has no use for torch, whose import takes seconds and memory."""

from __future__ import annotations

from typing import Any


class Desk:
    """Outcomes of workers, lines of metrics, which workers are there, and whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self._there: set[int] = set()  # ranks
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

    def come(self, rank: int) -> None:
        self._there.add(rank)

    def go(self, rank: int) -> None:
        self._there.discard(rank)

    def ask_to_stop(self) -> bool:
        """Whether there is a worker to hear it."""
        self._stop = True
        return bool(self._there)

    def stop_asked(self) -> bool:
        return self._stop
