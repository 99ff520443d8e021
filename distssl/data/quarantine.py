"""Samples that cannot be used: which, and why. A record and a short cut, never part of the order.

Whether a sample is bad is a property of its bytes, so a rank that has not met it yet comes to the same conclusion.
"""

from __future__ import annotations

import logging
from typing import TypedDict

from distssl.errors import RunError

log = logging.getLogger(__name__)

FEWEST_SEEN = 1000  # below this many samples a share of bad ones says little


class Entry(TypedDict):
    """One bad sample."""

    id: int
    shard: str
    offset: int
    key: str
    reason: str


class Quarantine:
    """The bad samples this rank knows of, by id."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self._fresh: list[Entry] = []

    def __contains__(self, sample: int) -> bool:
        return sample in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, entry: Entry) -> None:
        """Name a bad sample in one log line and keep it out from now on."""
        self.entries[entry["id"]] = entry
        self._fresh.append(entry)
        log.warning("bad sample %s at %d, %s: %s", entry["shard"], entry["offset"], entry["key"], entry["reason"])

    def take_fresh(self) -> list[Entry]:
        """The entries added since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def merge(self, entries: list[Entry]) -> None:
        """Learn what other ranks or an earlier run found."""
        for entry in entries:
            self.entries.setdefault(entry["id"], entry)


def check_share(num_bad: int, num_seen: int, num_samples: int, max_bad_fraction: float) -> None:
    """Raise RunError where more than max_bad_fraction of the samples seen are bad."""
    if num_bad > max_bad_fraction * max(num_seen, min(num_samples, FEWEST_SEEN)):
        raise RunError(
            f"{num_bad} of the {num_seen} samples seen are bad, more than data.max_bad_fraction={max_bad_fraction}; "
            "quarantine.jsonl in the run folder names them"
        )
