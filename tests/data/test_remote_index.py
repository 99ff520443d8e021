"""index and prepare of tars on a store: in place, by ranged reads, the same rows as of local tars."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from botocore import exceptions

from distssl.config import Machine
from distssl.data import dataset as datasets
from distssl.data import images, indexing, ranged, shards, tars
from distssl.data.shards import Dataset
from distssl.errors import ConfigError, RunError
from tests import annotated, planted
from tests.data import test_loader
from tests.object_server import Asked, Fault, ObjectServer

BUCKET = "bucket"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tars of photos, some of them large, with labels, a mask and what cannot be used."""
    members = planted.mixed(24)
    large = [(f"large{i}.jpg", planted.picture(i, "JPEG", (900, 700), quality=95)) for i in range(8)]
    for shard in range(3):
        mask = planted.encode(np.zeros((44, 60), np.uint8))
        extra = [("a.cls", b"2"), ("a.mask.png", mask), ("a.png", planted.picture(shard)), ("b.jpg", b"garbage" * 999)]
        planted.write_tar(tmp_path / f"objects/t/{shard}.tar", [*members[8 * shard : 8 * shard + 8], *extra, *large])
    return tmp_path / "objects/t"


@pytest.fixture
def server(folder: Path) -> Iterator[ObjectServer]:
    found = ObjectServer(folder.parent, writable=True)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A bucket of a server of moto's, which this process and its children take for AWS."""
    log = tmp_path_factory.mktemp("moto") / "log"
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch, open(log, "w") as file:
        process = subprocess.Popen([Path(sys.executable).parent / "moto_server", "-p", "0"], stderr=file, stdout=file)
        try:
            deadline = time.monotonic() + 30
            while "Running on http" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
            url = log.read_text().partition("Running on ")[2].split()[0]
            for key, value in {**keys, "AWS_ENDPOINT_URL": url, "NO_PROXY": "127.0.0.1"}.items():
                patch.setenv(key, value)
            found = boto3.resource("s3").Bucket(BUCKET)
            found.create()
            yield found
            found.meta.client.close()
        finally:
            process.terminate()
            process.wait()


def upload(s3: Any, folder: Path, prefix: str) -> str:
    for path in folder.iterdir():
        if path.is_file():
            s3.upload_file(str(path), f"{prefix}/{path.name}")
    return f"s3://{BUCKET}/{prefix}"


def equal_rows(a: Dataset, b: Dataset) -> bool:
    """Of two datasets, but for the order of shards."""
    ids = np.arange(a.num_samples)
    rows = [each.rows(ids, ("mask",)) for each in (a, b)]
    names = ("shard", "offset", "size", "height", "width", "label")
    same = all(np.array_equal(getattr(rows[0], name), getattr(rows[1], name)) for name in names)
    masks = [(each.annotation_offset["mask"].tolist(), each.annotation_size["mask"].tolist()) for each in rows]
    return same and masks[0] == masks[1] and a.keys(ids) == b.keys(ids)


def rejected(place: Path) -> list[str]:
    return (place / "rejected.jsonl").read_text().splitlines()


def test_an_index_beside_remote_tars_has_the_rows_of_a_local_one(
    server: ObjectServer, folder: Path, tmp_path: Path
) -> None:
    url = f"{server.url}/t/{{0..2}}.tar"
    assert indexing.index(url, cache_dir=tmp_path / "cache") == f"{server.url}/t"
    assert sum(server.sent[f"t/{i}.tar"] for i in range(3)) < 0.6 * sum(p.stat().st_size for p in folder.glob("*.tar"))
    told = rejected(folder)
    there = Dataset.open(f"{server.url}/t", Machine(cache=tmp_path / "cache"))
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.json", "*.parquet", "*.jsonl"))
    here = Dataset.open(shards.index(str(tmp_path / "copy")))
    assert equal_rows(there, here)
    assert told == rejected(tmp_path / "copy")
    assert here.fingerprint != there.fingerprint
    described = json.loads((folder / "dataset.json").read_text())["shards"]
    etags = [server.etag(folder / f"{i}.tar").strip('"') for i in range(3)]
    assert [(shard["path"], shard["sha256"], shard["etag"]) for shard in described] == [
        (f"{i}.tar", None, etags[i]) for i in range(3)
    ]


def test_an_index_on_s3_gives_the_views_of_local_tars(s3: Any, folder: Path, tmp_path: Path) -> None:
    url = upload(s3, folder, "plain")
    assert shards.prepare(f"{url}/", tmp_path / "cache") == url
    there = Dataset.open(url, Machine(cache=tmp_path / "cache"))
    here = Dataset.open(shards.index(str(folder)))
    assert equal_rows(there, here)
    found, bad = test_loader.batches(there, global_batch=16)
    expected, _ = test_loader.batches(here, global_batch=16)
    assert not bad
    assert all(test_loader.equal(a, b) for a, b in zip(found, expected, strict=True))
    names = {each.key for each in s3.objects.filter(Prefix="plain/")}
    assert names == {
        f"plain/{name}" for name in (*(f"{i}.tar" for i in range(3)), "dataset.json", "index.parquet", "rejected.jsonl")
    }


def test_a_folder_packed_here_and_copied_to_s3_opens_as_it_is(s3: Any, tmp_path: Path) -> None:
    packed = shards.pack(str(annotated.images(tmp_path / "images", 32)), tmp_path / "packed")
    url = upload(s3, packed, "packed")
    assert shards.prepare(url, tmp_path / "cache") == url
    there, here = Dataset.open(url, Machine(cache=tmp_path / "cache")), Dataset.open(packed)
    assert there.fingerprint == here.fingerprint
    assert [tar.sha256 for tar in there.tars] == list(here.shard_sha256)
    found, expected = (test_loader.batches(each, global_batch=16)[0] for each in (there, here))
    assert all(test_loader.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_some_tars_of_a_prefix_get_an_index_of_their_own(s3: Any, folder: Path, tmp_path: Path) -> None:
    url = upload(s3, folder, "some")
    for pattern in ("[01].tar", "{0,1}.tar"):
        place = str(shards.prepare(f"{url}/{pattern}", tmp_path / "cache"))
        assert place.startswith(f"{url}/")
        dataset = Dataset.open(place, Machine(cache=tmp_path / "cache"))
        assert dataset.shard_paths == [f"{url}/0.tar", f"{url}/1.tar"]
    with pytest.raises(ConfigError, match="holds the index of other tars"):
        indexing.index(f"{url}/2.tar", f"{url}/_01_.index", cache_dir=tmp_path / "cache")


def test_tars_that_cannot_be_written_beside_are_indexed_in_the_cache(
    server: ObjectServer, folder: Path, tmp_path: Path
) -> None:
    server.writable = False
    url = f"{server.url}/t/{{0..2}}.tar"
    with pytest.raises(ConfigError, match=r"out=.*405 .*say where the index goes|out=.* cannot be written"):
        indexing.index(url, cache_dir=tmp_path / "cache")
    place = shards.prepare(url, tmp_path / "cache")
    assert isinstance(place, Path)
    assert place.parent == tmp_path / "cache"
    dataset = Dataset.open(place, Machine(cache=tmp_path / "cache"))
    assert dataset.shard_paths == [f"{server.url}/t/{i}.tar" for i in range(3)]
    assert len(test_loader.batches(dataset, global_batch=16)[0]) > 0
    assert not (folder / "dataset.json").exists()
    server.sent.clear()
    assert shards.prepare(url, tmp_path / "cache") == place
    assert not any(server.sent.values())  # every scan is kept


KILLED = """
import os, signal, sys
from pathlib import Path
from distssl.data import indexing
indexing.THREADS = 1
def die(done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
indexing.index(sys.argv[1], cache_dir=Path(sys.argv[2]), progress=die)
"""


def test_a_killed_indexing_goes_on_and_reads_no_tar_twice(server: ObjectServer, tmp_path: Path) -> None:
    url = f"{server.url}/t/{{0..2}}.tar"
    killed = subprocess.run([sys.executable, "-c", KILLED, url, str(tmp_path / "cache")], check=False)
    assert killed.returncode == -signal.SIGKILL
    server.asked.clear()
    indexing.index(url, cache_dir=tmp_path / "cache")
    assert not server.reads("t/0.tar")
    assert not server.reads("t/1.tar")
    assert server.reads("t/2.tar")


def test_a_store_that_does_not_answer_ends_an_indexing_in_one_line(server: ObjectServer, tmp_path: Path) -> None:
    server.misbehave = lambda asked: Fault(status=503) if asked.name == "t/1.tar" else None
    with pytest.raises(RunError, match=r"t/1\.tar: 503 .*machine\.retry_s=0\.5"):
        indexing.index(f"{server.url}/t/{{0..2}}.tar", cache_dir=tmp_path / "cache", retry_s=0.5)


def test_a_store_that_stumbles_changes_nothing(server: ObjectServer, folder: Path, tmp_path: Path) -> None:
    def stumble(asked: Asked) -> Fault | None:
        return {0: Fault(status=503), 3: Fault(reset=True), 5: Fault(cut=50)}.get(len(server.asked) % 7)

    server.misbehave = stumble
    indexing.index(f"{server.url}/t/{{0..2}}.tar", tmp_path / "stumbled", cache_dir=tmp_path / "cache", retry_s=20)
    server.misbehave = lambda asked: None
    indexing.index(f"{server.url}/t/{{0..2}}.tar", tmp_path / "walked", cache_dir=tmp_path / "cache")
    assert (tmp_path / "stumbled/dataset.json").read_bytes() == (tmp_path / "walked/dataset.json").read_bytes()


def test_verify_decodes_what_a_header_does_not_tell(server: ObjectServer, folder: Path, tmp_path: Path) -> None:
    cut = planted.picture(0, "JPEG", (400, 300))
    planted.write_tar(folder / "3.tar", [("cut.jpg", cut[: len(cut) // 2]), ("whole.jpg", cut)])
    url = f"{server.url}/t/3.tar"
    for verify, num in ((False, 2), (True, 1)):
        out = indexing.index(url, tmp_path / str(verify), verify=verify, cache_dir=tmp_path / "cache")
        assert Dataset.open(out, Machine(cache=tmp_path / "cache")).num_samples == num


@pytest.mark.parametrize("verify", [True, False])
def test_an_index_on_a_store_stays_as_it_is_while_its_tars_do(
    server: ObjectServer, folder: Path, tmp_path: Path, verify: bool
) -> None:
    """Also where another machine, whose cache is empty, prepares the same."""
    cut, url = planted.picture(0, "JPEG", (400, 300)), f"{server.url}/t/{{0..1}}.tar"
    planted.write_tar(folder / "1.tar", [("cut.jpg", cut[: len(cut) // 2]), ("whole.jpg", cut)])
    indexing.index(url, verify=verify, cache_dir=tmp_path / "here")
    before = (folder / "dataset.json").read_bytes()
    server.asked.clear()
    assert shards.prepare(url, tmp_path / "elsewhere") == f"{server.url}/t"
    assert not server.reads("t/0.tar")
    assert not server.reads("t/1.tar")
    assert (folder / "dataset.json").read_bytes() == before
    planted.write_tar(folder / "1.tar", [("cut.jpg", cut[: len(cut) // 2]), ("other.jpg", cut), ("third.jpg", cut)])
    (folder / "0.tar").unlink()
    shards.prepare(url, tmp_path / "elsewhere")
    described = json.loads((folder / "dataset.json").read_text())
    assert (described["verify"], described["samples"]) == (verify, 2 if verify else 3)


def test_an_index_of_a_folder_packed_here_and_copied_is_not_made_anew_by_a_pattern(
    server: ObjectServer, folder: Path, tmp_path: Path
) -> None:
    shards.index(str(folder))
    before = (folder / "dataset.json").read_bytes()
    assert shards.prepare(f"{server.url}/t/{{0..2}}.tar", tmp_path / "cache") == f"{server.url}/t"
    assert (folder / "dataset.json").read_bytes() == before


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("s3://bucket/nothing/", "404 .*check the URL"),
        ("s3://no-such-bucket/t/", "404 .*bucket does not exist"),
        ("s3://bucket/none-*.tar", "holds no"),
        ("s3://bucket/t/9.tar", "s3://bucket/t: 404 .*check the URL"),
        ("gopher://x/y.tar", "gopher:// is not known"),
        ("http://127.0.0.1:1/t/", "no better in machine.retry_s=0.5 seconds"),
    ],
)
def test_a_source_that_is_not_there_is_one_line_with_its_key(s3: Any, tmp_path: Path, source: str, says: str) -> None:
    with pytest.raises((ConfigError, RunError), match=says) as told:
        shards.prepare(source, tmp_path / "cache", retry_s=0.5)
    assert len(str(told.value).splitlines()) == 1


def test_http_lists_no_folders_and_says_so(server: ObjectServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.source=http.*HTTP lists no folders; name the tars"):
        shards.prepare(f"{server.url}/t/", tmp_path / "cache")


def test_wrong_credentials_are_named(server: ObjectServer, tmp_path: Path) -> None:
    server.misbehave = lambda asked: Fault(status=403)
    with pytest.raises(ConfigError, match=r"t/0\.tar: 403 .*check the credentials"):
        shards.prepare(f"{server.url}/t/0.tar", tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"dataset\.json: 403"):
        Dataset.open(f"{server.url}/t", Machine(cache=tmp_path / "cache"))


def test_copies_of_indexes_are_few_and_follow_the_store(
    server: ObjectServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "INDEXES", 2)
    machine = Machine(cache=tmp_path / "cache")
    for num in (1, 2, 3):
        shutil.rmtree(folder / ".index", ignore_errors=True)
        indexing.index(f"{server.url}/t/{{0..{num - 1}}}.tar", f"{server.url}/t", cache_dir=tmp_path / "cache")
        opened = Dataset.open(f"{server.url}/t", machine)
        assert len(opened.shard_paths) == num
    assert len([path for path in (tmp_path / "cache/indexes").iterdir() if path.is_dir()]) == 2
    assert opened.rows(np.arange(opened.num_samples)).size.min() > 0


def test_processes_that_copy_other_indexes_do_not_meet_in_deleting_old_ones(
    server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "INDEXES", 1)
    machine = Machine(cache=tmp_path / "cache")
    for num in range(3):
        indexing.index(f"{server.url}/t/{num}.tar", f"{server.url}/of{num}", cache_dir=tmp_path / "cache")

    def copy_them(first: int) -> None:
        for turn in range(10):
            datasets._copied(f"{server.url}/of{(first + turn) % 3}", machine)

    with ThreadPoolExecutor(3) as pool:  # a lock keeps threads apart as it does processes
        assert list(pool.map(copy_them, range(3))) == [None] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "JPEG2000"])
def test_a_header_is_read_the_same_a_window_at_a_time(
    server: ObjectServer, folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.setattr(ranged, "LARGEST_WINDOW", 64)
    exif = Image.Exif()
    exif[274] = 6
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    data = planted.picture(3, kind, (301, 203), **options)
    (folder / "x").write_bytes(b"before" + data + b"after")
    file = ranged.RangedFile(f"{server.url}/t/x", 5, window=64)
    span = ranged.Span(file, 6, len(data))
    assert images.read_header(span) == images.read_header(data)
    assert span[:] == data
    if kind not in ("PNG", "WEBP", "TIFF"):  # whose orientation may stand at their end
        assert server.sent["t/x"] < 2 * len(data)


def test_a_tar_is_scanned_the_same_whatever_is_cut_off(server: ObjectServer, folder: Path) -> None:
    whole = (folder / "0.tar").read_bytes()
    for size in (0, 100, 512, 5000, 20_000, len(whole) // 2, len(whole) - 10_000, len(whole)):
        (folder / "cut.tar").write_bytes(whole[:size])
        there = tars.scan(f"{server.url}/t/cut.tar", max_pixels=10**6, retry_s=5)
        here = tars.scan(folder / "cut.tar", max_pixels=10**6)
        assert there.rows == here.rows
        assert there.rejected == here.rejected
        assert there.bad_annotations == here.bad_annotations


def test_no_credentials_at_all_are_named_at_once(tmp_path: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    environ |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path), "AWS_ENDPOINT_URL": "http://127.0.0.1:1"}
    program = "import pathlib; from distssl.data import shards; shards.prepare('s3://b/x/', pathlib.Path.home())"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "ConfigError: data.source=s3://b/x/" in done.stderr
    assert exceptions.NoCredentialsError().args[0] in done.stderr
