"""A download is the object bit for bit, or one line that says why not, whatever the server and the disk do."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from distssl.data import locations, transfer
from distssl.data.transfer import Tar
from distssl.errors import RunError
from tests.object_server import Asked, Fault, ObjectServer

SIZE = 900_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ObjectServer]:
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects/a.tar").write_bytes(np.random.default_rng(0).bytes(SIZE))
    found = ObjectServer(tmp_path / "objects")
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK", 200_000)


def tar_of(server: ObjectServer, sha256: str | None = None) -> Tar:
    path = server.folder / "a.tar"
    return Tar(f"{server.url}/a.tar", path.stat().st_size, sha256, server.etag(path).strip('"'))


def download(tar: Tar, path: Path, retry_s: float = 5, on_full: Callable[[], bool] = lambda: False) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        return transfer.download(tar, descriptor, retry_s=retry_s, on_full=on_full)
    finally:
        os.close(descriptor)


def nth(server: ObjectServer, faults: dict[int, Fault]) -> None:
    """Faults of the n-th read of a.tar, from 0."""
    server.misbehave = lambda asked: faults.get(len(server.reads("a.tar")) - 1) if asked.method == "GET" else None


def test_a_download_asks_for_every_byte_once(server: ObjectServer, tmp_path: Path) -> None:
    assert download(tar_of(server), tmp_path / "a") == SIZE
    assert (tmp_path / "a").read_bytes() == (server.folder / "a.tar").read_bytes()
    ranges = [(asked.start, asked.end) for asked in server.reads("a.tar")]
    assert ranges == [(at, min(at + 200_000, SIZE)) for at in range(0, SIZE, 200_000)]


@pytest.mark.parametrize(
    "fault", [Fault(status=503), Fault(status=429), Fault(status=500), Fault(reset=True), Fault(cut=90_000)]
)
def test_what_passes_is_survived_and_costs_one_range_again(server: ObjectServer, tmp_path: Path, fault: Fault) -> None:
    nth(server, {1: fault, 2: fault})
    assert download(tar_of(server), tmp_path / "a") == SIZE
    assert (tmp_path / "a").read_bytes() == (server.folder / "a.tar").read_bytes()
    starts = [asked.start for asked in server.reads("a.tar")]
    assert starts[:4] == [0, 200_000, 200_000, 200_000]
    assert starts == sorted(starts)


def test_a_way_that_cuts_every_long_answer_is_gone_in_short_ones(server: ObjectServer, tmp_path: Path) -> None:
    server.misbehave = lambda asked: Fault(cut=70_000) if asked.end - asked.start > 70_000 else None
    assert download(tar_of(server), tmp_path / "a") == SIZE
    assert (tmp_path / "a").read_bytes() == (server.folder / "a.tar").read_bytes()


def test_a_server_that_is_away_for_a_while_is_waited_for(server: ObjectServer, tmp_path: Path) -> None:
    def go_away(asked: Asked) -> Fault | None:
        if len(server.reads("a.tar")) == 3:
            server.misbehave = lambda asked: None
            threading.Thread(target=away).start()
            return Fault(reset=True)
        return None

    def away() -> None:
        server.stop()
        time.sleep(1.5)
        server.start()

    server.misbehave = go_away
    assert download(tar_of(server), tmp_path / "a", retry_s=30) == SIZE
    assert (tmp_path / "a").read_bytes() == (server.folder / "a.tar").read_bytes()


def test_a_server_that_stays_away_is_named_when_the_time_is_up(server: ObjectServer, tmp_path: Path) -> None:
    tar = tar_of(server)
    server.stop()
    started = time.monotonic()
    with pytest.raises(
        RunError, match=r"http://127\.0\.0\.1:\d+/a\.tar: .*no better in machine\.retry_s=1 seconds"
    ) as told:
        download(tar, tmp_path / "a", retry_s=1)
    assert 0.9 < time.monotonic() - started < 3
    assert len(str(told.value).splitlines()) == 1
    server.start()


@pytest.mark.parametrize(("status", "says"), [(403, "403 .*check the credentials"), (404, "404 .*check the URL")])
def test_no_is_an_answer_at_once(server: ObjectServer, tmp_path: Path, status: int, says: str) -> None:
    server.misbehave = lambda asked: Fault(status=status)
    with pytest.raises(transfer.RefusedError, match=says) as told:
        download(tar_of(server), tmp_path / "a")
    assert len(server.asked) == 2  # HEAD, and fsspec's GET where HEAD is not allowed
    assert len(str(told.value).splitlines()) == 1


def test_a_cut_download_goes_on_where_it_was(server: ObjectServer, tmp_path: Path) -> None:
    nth(server, {2: Fault(status=403)})
    with pytest.raises(transfer.RefusedError):
        download(tar_of(server), tmp_path / "a")
    server.asked.clear()
    server.misbehave = lambda asked: None
    assert download(tar_of(server), tmp_path / "a") == SIZE - 400_000
    assert server.reads("a.tar")[0].start == 400_000
    assert (tmp_path / "a").read_bytes() == (server.folder / "a.tar").read_bytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sha256": "0" * 64}, "sha256 .* where the index says 000000000000, at 3 downloads"),
        ({"num_bytes": SIZE + 1}, f"{SIZE} bytes where the index says {SIZE + 1}"),
        ({"tag": "other"}, "has the tag .* where the index says other"),
    ],
)
def test_another_tar_than_the_indexed_one_is_named(
    server: ObjectServer, tmp_path: Path, change: dict, says: str
) -> None:
    tar = tar_of(server)
    fields = {"url": tar.url, "num_bytes": tar.num_bytes, "sha256": tar.sha256, "tag": tar.tag}
    with pytest.raises(transfer.TornError, match=says):
        download(Tar(**fields | change), tmp_path / "a")


def test_an_object_that_is_replaced_on_the_way_is_never_mixed(server: ObjectServer, tmp_path: Path) -> None:
    def replace(asked: Asked) -> Fault | None:
        if len(server.reads("a.tar")) == 3:
            (server.folder / "a.tar").write_bytes(bytes(SIZE))
        return None

    tar = tar_of(server)
    server.misbehave = replace
    with pytest.raises(transfer.RefusedError, match=r"412 .*index it again"):
        download(tar, tmp_path / "a")


def test_a_full_disk_is_made_room_on_once_it_can_be(server: ObjectServer, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        (disk / "other").write_bytes(bytes(500_000))
        with pytest.raises(OSError, match="No space left"):
            download(tar_of(server), disk / "a")
        assert download(tar_of(server), disk / "a", on_full=lambda: (disk / "other").unlink() is None) < SIZE
        assert (disk / "a").read_bytes() == (server.folder / "a.tar").read_bytes()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_tars_name_changes_with_its_content_and_not_with_its_place_where_that_is_known() -> None:
    one = Tar("s3://a/x.tar", 5, None, "tag")
    assert one.name != Tar("s3://a/x.tar", 5, None, "other").name
    assert one.name != Tar("s3://b/x.tar", 5, None, "tag").name
    assert Tar("s3://a/x.tar", 5, "ab", None).name == Tar("s3://b/y.tar", 5, "ab", "t").name


def test_a_kind_of_url_that_nobody_reads_is_the_users_mistake() -> None:
    with pytest.raises(ValueError, match=r"data\.source=s4://x: s4:// is not known"):
        locations.check("s4://x", "data.source")
