"""Files at a URL: what is there is what was put there, whatever the store does meanwhile; mistakes are one line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from distssl import stores
from distssl.errors import ConfigError, RunError
from distssl.remote import Remote
from tests import buckets
from tests.buckets import Server, Unreliable


@pytest.fixture(params=["s3", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/some/where"
    return f"{request.param}://{tmp_path}/some/where"


def test_files_at_a_url_are_those_that_were_put_there(place: str, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(3 << 20))
    there = Remote(place)
    assert there.names() == []
    there.check()
    there.write("a.txt", b"one")
    there.write("deeper/b.txt", b"two")
    there.write("deeper still", b"is another folder's neighbour")
    there.put("deeper/down/big", tmp_path / "big")
    assert there.names() == ["a.txt", "deeper still", "deeper/b.txt", "deeper/down/big"]
    assert there.names("deeper") == ["deeper/b.txt", "deeper/down/big"]
    there.write("a.txt", b"three")
    assert there.read("a.txt") == b"three"
    there.get("deeper/down/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "big").read_bytes()
    there.remove("deeper/b.txt", "never there", "a.txt")
    assert there.names() == ["deeper still", "deeper/down/big"]
    assert there.read("a.txt") is None
    with pytest.raises(FileNotFoundError):
        there.get("a.txt", tmp_path / "back")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("z3://bucket/runs", "z3:// is not known"),
        ("gs://bucket/runs", "gs:// needs a package: "),
        ("s3:///", "s3:// and what?"),
    ],
)
def test_a_url_that_nothing_here_reads_is_refused(url: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        stores.absolute(url)


def test_a_store_that_fails_for_a_while_is_waited_for(unreliable: Unreliable, bucket: str) -> None:
    there = Remote(f"{bucket}/runs")
    there.check()
    unreliable.fail_for(3)
    there.write("a", b"one")
    assert unreliable.refused > 0
    assert there.read("a") == b"one"


def test_a_store_that_does_not_come_back_is_named(
    unreliable: Unreliable, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    there = Remote(f"{bucket}/runs")
    there.patience_s = 0.5
    unreliable.fail_for(600)
    with pytest.raises(RunError, match=rf"{bucket}/runs: a cannot be written: .* for \d+ s; the same command"):
        there.write("a", b"one")
    buckets.point_at(monkeypatch, "http://127.0.0.1:9")  # nobody listens
    there = Remote(f"{bucket}/runs")
    there.patience_s = 0.5
    with pytest.raises(RunError, match="Could not connect"):
        there.read("a")


def test_no_bucket_and_wrong_or_no_credentials_are_told_at_once(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"s3://nobodys-bucket/runs: .*bucket does not exist; make the bucket"):
        Remote("s3://nobodys-bucket/runs").check()
    strict = Server(INITIAL_NO_AUTH_ACTION_COUNT="1")
    try:
        mine = strict.make_bucket("mine")  # the one action that is free
        buckets.point_at(monkeypatch, strict.endpoint)
        with pytest.raises(ConfigError, match=r"s3://mine/runs: .*credentials that may read, write"):
            Remote(f"{mine}/runs").check()
    finally:
        strict.close()
    buckets.point_at(monkeypatch, "http://127.0.0.1:9", AWS_CONFIG_FILE="/none", AWS_SHARED_CREDENTIALS_FILE="/none")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=r"[Cc]redentials; credentials that may read, write"):
        Remote(f"{bucket}/runs").check()
    assert time.monotonic() - started < 60


def test_a_forked_process_opens_its_own(bucket: str) -> None:
    there = Remote(f"{bucket}/runs")
    there.write("a", b"of the parent")
    pid = os.fork()
    if pid == 0:
        try:
            there.write("b", there.read("a") or b"")
        finally:
            os._exit(0)
    deadline = time.monotonic() + 60
    while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert there.read("b") == b"of the parent"
