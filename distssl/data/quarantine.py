"""Samples that cannot be used: which, and why. A record and a short cut, never part of the order.

Whether a sample is bad is a property of its bytes, so a rank that has not met it yet comes to the same conclusion. A
training goes on where bytes cannot be read; what is kept for good must not lack an image for an error that passes.
"""

from __future__ import annotations

import logging
from typing import TypedDict

from distssl.errors import RunError

log = logging.getLogger(__name__)

SOURCE, LABELLED = "data.source", "data.labelled"  # keys of datasets
FEWEST_SEEN = 1000  # below this many samples a share of bad ones says little


class Entry(TypedDict):
    """One bad sample. source: the config's key of the dataset in which `id` counts."""

    source: str
    id: int
    shard: str
    offset: int
    key: str
    reason: str


class Quarantine:
    """The bad samples this rank knows of, by source and id; what it says of a sample is of those of its own source.

    lasting: of their bytes alone; what cannot be read, as a file server's disk may not for a moment, is a RunError.
    """

    def __init__(self, source: str = SOURCE, *, lasting: bool = False) -> None:
        self.source, self.lasting = source, lasting
        self.entries: dict[tuple[str, int], Entry] = {}
        self._fresh: list[Entry] = []

    def of(self, source: str) -> Quarantine:
        """The same record, for the samples of another source."""
        other = Quarantine(source, lasting=self.lasting)
        other.entries, other._fresh = self.entries, self._fresh
        return other

    def __contains__(self, sample: int) -> bool:
        return (self.source, sample) in self.entries

    def __len__(self) -> int:
        return sum(source == self.source for source, _ in self.entries)

    def add(self, entry: Entry) -> None:
        """Name a bad sample in one log line and keep it out from now on."""
        self.entries[place(entry)] = entry
        self._fresh.append(entry)
        log.warning("bad sample %s at %d, %s: %s", entry["shard"], entry["offset"], entry["key"], entry["reason"])

    def take_fresh(self) -> list[Entry]:
        """The entries added since the last call."""
        fresh = list(self._fresh)
        self._fresh.clear()
        return fresh

    def merge(self, entries: list[Entry]) -> None:
        """Learn what other ranks or an earlier run found."""
        for entry in entries:
            self.entries.setdefault(place(entry), entry)


def place(entry: Entry) -> tuple[str, int]:
    """Source and id."""
    return entry.get("source", SOURCE), entry["id"]  # runs of earlier versions wrote no source


def check_share(
    bad: Quarantine,
    num_seen: int,
    num_samples: int,
    max_bad_fraction: float,
    named_by: str = "quarantine.jsonl in the run folder",
) -> None:
    """Raise RunError where more than max_bad_fraction of the samples seen of a source are bad."""
    if len(bad) > max_bad_fraction * max(num_seen, min(num_samples, FEWEST_SEEN)):
        raise RunError(
            f"{len(bad)} of the {num_seen} samples of {bad.source} seen are bad, more than "
            f"data.max_bad_fraction={max_bad_fraction}; {named_by} names them"
        )
