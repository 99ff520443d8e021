"""A run folder at a URL and its working copy: which of two files counts, and when it gets there."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from distssl import mirror
from distssl.errors import RunError
from distssl.mirror import Mirror
from tests.buckets import Unreliable


@pytest.fixture
def copies(bucket: str, tmp_path: Path) -> Mirror:
    (tmp_path / "copy").mkdir()
    return Mirror(tmp_path / "copy", f"{bucket}/runs/demo")


def test_the_store_wins_over_what_an_earlier_start_left(copies: Mirror) -> None:
    for name, data in {"config.yaml": b"of the store", "pictures/a.png": b"a", "fits/x/result.json": b"{}"}.items():
        copies.remote.write(name, data)
    (copies.folder / "config.yaml").write_text("stale, and longer than what is at the store")
    (copies.folder / "metrics.jsonl").write_text("of another run")
    (copies.folder / ".lock").touch()
    copies.pull(exactly=True)
    copies.pull("pictures", exactly=True)
    there = {path.relative_to(copies.folder).as_posix() for path in copies.folder.rglob("*") if path.is_file()}
    assert there == {"config.yaml", "pictures/a.png", ".lock"}
    assert (copies.folder / "config.yaml").read_bytes() == b"of the store"


def test_what_has_changed_is_put_there_and_nothing_else(unreliable: Unreliable, copies: Mirror) -> None:
    copies.remote.write("summary.json", b"of somebody else")
    copies.pull(exactly=True)
    (copies.folder / "metrics.jsonl").write_text("1\n")
    (copies.folder / ".hidden").touch()
    unreliable.seen.clear()
    copies.push(*mirror.RECORDS)
    copies.push(*mirror.RECORDS)
    assert [path.rpartition("/")[2] for method, path in unreliable.seen if method == "PUT"] == ["metrics.jsonl"]
    with open(copies.folder / "metrics.jsonl", "a") as file:
        file.write("2\n")
    copies.push(*mirror.RECORDS)
    assert copies.remote.read("metrics.jsonl") == b"1\n2\n"
    assert copies.remote.names() == ["metrics.jsonl", "summary.json"]


def test_records_get_there_while_the_run_goes_and_at_its_end(copies: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "PUSH_EVERY_S", 0.05)
    path = copies.folder / "metrics.jsonl"
    with copies.pushing():
        path.write_text("1\n")
        deadline = time.monotonic() + 30
        while copies.remote.read("metrics.jsonl") != b"1\n" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert copies.remote.read("metrics.jsonl") == b"1\n"
        path.write_text("1\n2\n")
    assert copies.remote.read("metrics.jsonl") == b"1\n2\n"


def test_a_long_record_is_put_there_less_often_but_at_the_end(copies: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "PUSH_BYTES_PER_S", 1)
    path = copies.folder / "ledger.jsonl"
    path.write_text("1" * 100)
    copies.push("", gently=True)
    path.write_text("2" * 101)
    copies.push("", gently=True)
    assert copies.remote.read("ledger.jsonl") == b"1" * 100
    copies.push("")
    assert copies.remote.read("ledger.jsonl") == b"2" * 101


def test_a_run_that_fails_says_why_though_the_store_is_gone(
    unreliable: Unreliable, copies: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "LAST_PATIENCE_S", 0.1)
    copies.remote.check()

    def fail() -> None:
        (copies.folder / "metrics.jsonl").write_text("1\n")
        unreliable.fail_for(600)
        raise RunError("the loss is nan")

    with pytest.raises(RunError, match="the loss is nan"), copies.pushing():
        fail()


def test_runs_of_one_name_at_two_places_have_two_working_copies(tmp_path: Path) -> None:
    places = ("s3://a/runs", "s3://b/runs")
    assert len({mirror.working_copy(place, "demo", tmp_path) for place in places}) == 2
