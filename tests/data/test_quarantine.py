"""Quarantine: one line a bad sample, each known once, and too many of them end the run."""

from __future__ import annotations

import logging

import pytest

from distssl.data import quarantine
from distssl.data.quarantine import Entry, Quarantine
from distssl.errors import RunError


def entry(sample: int, reason: str = "zero bytes", source: str = quarantine.SOURCE) -> Entry:
    return {"source": source, "id": sample, "shard": "a.tar", "offset": 512, "key": f"k{sample}", "reason": reason}


def test_a_bad_sample_is_named_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    known = Quarantine()
    with caplog.at_level(logging.WARNING):
        known.add(entry(3))
    assert [record.getMessage() for record in caplog.records] == ["bad sample a.tar at 512, k3: zero bytes"]
    assert 3 in known
    assert 4 not in known
    assert len(known) == 1


def test_fresh_entries_are_taken_once_and_others_findings_are_not_fresh() -> None:
    known = Quarantine()
    known.add(entry(3))
    known.merge([entry(3, "another reason"), entry(5)])
    assert known.take_fresh() == [entry(3)]
    assert known.take_fresh() == []
    assert list(known.entries.values()) == [entry(3), entry(5)]


def test_ids_of_another_dataset_are_other_samples_in_the_same_record() -> None:
    known = Quarantine()
    labelled = known.of(quarantine.LABELLED)
    labelled.add(entry(3, source=quarantine.LABELLED))
    known.add(entry(5))
    assert [3 in known, 5 in known, 3 in labelled, 5 in labelled] == [False, True, True, False]
    assert (len(known), len(labelled), len(known.entries)) == (1, 1, 2)
    assert [found["id"] for found in known.take_fresh()] == [3, 5]
    assert labelled.take_fresh() == []


@pytest.mark.parametrize(
    ("bad", "seen", "samples", "ends"),
    [
        (50, 1000, 10**6, False),
        (51, 1000, 10**6, True),
        (50, 10, 10**6, False),  # few seen: a share says little yet
        (51, 10, 10**6, True),
        (5, 100, 100, False),
        (6, 10, 100, True),
        (500, 10_000, 10**6, False),
        (501, 10_000, 10**6, True),
    ],
)
def test_too_large_a_share_ends_the_run(bad: int, seen: int, samples: int, ends: bool) -> None:
    known = Quarantine()
    known.merge([entry(sample) for sample in range(bad)])
    if not ends:
        quarantine.check_share(known, seen, samples, 0.05)
        return
    told = rf"{bad} of the {seen} samples of data\.source .* data\.max_bad_fraction=0.05; quarantine.jsonl"
    with pytest.raises(RunError, match=told):
        quarantine.check_share(known, seen, samples, 0.05)
