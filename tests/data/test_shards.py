"""prepare: what `data.source` of a run means."""

from __future__ import annotations

import errno
import io
import json
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distssl import atomic
from distssl.data import indexing, shards
from distssl.errors import ConfigError
from tests import planted


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(9):
        (tmp_path / f"photos/{i}.jpg").write_bytes(picture(i))
    return tmp_path / "photos"


@pytest.fixture
def tarred(tmp_path):
    (tmp_path / "tarred").mkdir()
    with tarfile.open(tmp_path / "tarred/a.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = len(picture(0))
        tar.addfile(info, io.BytesIO(picture(0)))
    return tmp_path / "tarred"


def test_a_folder_of_photos_is_packed_once_and_again_when_it_changes(photos, tmp_path):
    first = shards.prepare(str(photos), tmp_path / "cache")
    written = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert first.parent == tmp_path / "cache"
    assert shards.prepare(str(photos), tmp_path / "cache") == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == written
    (photos / "new.jpg").write_bytes(picture(99))
    second = shards.prepare(str(photos), tmp_path / "cache")
    assert second != first
    assert shards.Dataset.open(second).num_samples == 10
    assert shards.Dataset.open(first).num_samples == 9


def test_images_that_change_below_the_same_csv_are_packed_again(photos, tmp_path):
    table = tmp_path / "photos.csv"
    table.write_text("path\n" + "".join(f"photos/{i}.jpg\n" for i in (*range(9), "gone")))
    first = shards.prepare(str(table), tmp_path / "cache")
    assert shards.prepare(str(table), tmp_path / "cache") == first
    (photos / "3.jpg").write_bytes(picture(99) + b" ")
    second = shards.prepare(str(table), tmp_path / "cache")
    assert second != first
    assert picture(99) in b"".join(path.read_bytes() for path in second.glob("*.tar"))


def test_what_an_older_version_packed_into_the_cache_does_not_stand_in_the_way(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "VERSION", indexing.VERSION - 1)
    old = shards.prepare(str(photos), tmp_path / "cache")
    monkeypatch.undo()
    new = shards.prepare(str(photos), tmp_path / "cache")
    assert new != old
    assert shards.Dataset.open(new).num_samples == 9


def test_an_indexed_folder_is_used_as_it_is(photos, tmp_path):
    out = shards.pack(str(photos), tmp_path / "out")
    assert shards.prepare(str(out), tmp_path / "cache") == out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("url", ["tarred", "tarred/*.tar", "tarred/a.tar", "tarred/{a,b}.tar"])
def test_tars_are_indexed_where_they_lie(url, tarred, tmp_path):
    folder = shards.prepare(str(tmp_path / url), tmp_path / "cache")
    assert folder.is_relative_to(tarred)
    assert shards.Dataset.open(folder).num_samples == 1
    assert shards.prepare(str(tmp_path / url), tmp_path / "cache") == folder
    assert not (tmp_path / "cache").exists()


def test_a_verified_index_stays_verified_also_when_tars_are_added(tarred, tmp_path):
    cut = planted.picture(1, "JPEG")
    planted.write_tar(tarred / "a.tar", [("a.jpg", picture(0)), ("cut.jpg", cut[: len(cut) // 2])])
    folder = shards.index(str(tarred), verify=True, max_pixels=10_000)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".tar"}
    for pattern in ("*.tar", "a.tar"):
        assert shards.prepare(str(tarred / pattern), tmp_path / "cache") == folder
        assert {path: path.read_bytes() for path in before} == before
    planted.write_tar(tarred / "b.tar", [("cut2.jpg", cut[: len(cut) // 2]), ("b.jpg", picture(2))])
    planted.write_tar(tarred / "c.tar", [("large.png", planted.picture(3, size=(200, 100)))])
    assert shards.prepare(str(tarred / "*.tar"), tmp_path / "cache") == folder
    assert shards.Dataset.open(folder).num_samples == 2


def test_packing_again_leaves_a_verified_index(photos, tmp_path):
    out = shards.pack(str(photos), tmp_path / "out")
    before = (shards.index(str(out), verify=True) / "dataset.json").read_bytes()
    assert json.loads(before)["verify"]
    shards.pack(str(photos), out)
    assert (out / "dataset.json").read_bytes() == before


def test_an_index_that_does_not_say_how_it_was_made_is_read_and_made_anew(tarred, tmp_path):
    folder = shards.prepare(str(tarred / "*.tar"), tmp_path / "cache")
    described = json.loads((folder / "dataset.json").read_text())
    old = {key: value for key, value in described.items() if key not in ("verify", "max_pixels")}
    (folder / "dataset.json").write_text(json.dumps(old))
    assert shards.Dataset.open(folder).fingerprint == described["fingerprint"]
    assert shards.prepare(str(tarred / "*.tar"), tmp_path / "cache") == folder
    assert json.loads((folder / "dataset.json").read_text()) == described


def test_tars_that_cannot_be_written_beside_are_indexed_in_the_cache(tarred, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    folder = shards.prepare(str(tarred), tmp_path / "cache")
    assert folder.parent == tmp_path / "cache"
    assert shards.Dataset.open(folder).shard_paths == [tarred / "a.tar"]
    assert [path.name for path in tarred.iterdir()] == ["a.tar"]


def test_two_processes_that_pack_the_same_take_turns(photos, tmp_path, caplog):
    """flock belongs to the open file, so a second open in this process is as good as another process."""
    caplog.set_level("INFO")
    out = tmp_path / "out"
    out.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with atomic.locked(out):
            packed = pool.submit(shards.pack, str(photos), out)
            while "waiting for it" not in caplog.text and not packed.done():
                time.sleep(0.01)
            assert not packed.done()
            assert [path.name for path in out.iterdir()] == [".lock"]
        assert shards.Dataset.open(packed.result(timeout=60)).num_samples == 9
        assert list(out.glob("*.tar"))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "is empty"),
        ("cifar11", "Did you mean cifar10"),
        ("no/such/place", "does not exist"),
        ("no/such/place/*.tar", "does not exist"),
        ("nowhere.tar", "does not exist"),
        ("s4://bucket/*.tar", "is not known"),
        ("text", "holds no image"),
        *((f"{'long' * 80}{end}", "File name too long; give") for end in ("", ".tar", "/*.tar")),
    ],
)
def test_a_mistake_is_one_line_with_the_key_and_the_value(source, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    with pytest.raises(ConfigError, match=says) as caught:
        shards.prepare(source, tmp_path / "cache")
    assert str(caught.value).startswith("data.source" + (f"={source}: " if source else ": "))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["exists", "iterdir"])
def test_a_folder_that_cannot_be_read_is_one_line(name, photos, tmp_path, monkeypatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, name, refuse)
    with pytest.raises(ConfigError, match=rf"^data\.source={photos}: .*cannot be read: Permission denied; give"):
        shards.prepare(str(photos), tmp_path / "cache")


def test_a_csv_of_paths_that_cannot_be_is_packed_without_them(photos, tmp_path, caplog):
    (tmp_path / "s.csv").write_text(f"path\nphotos/0.jpg\nnu\0l.jpg\n{'long' * 80}.jpg\n")
    assert shards.Dataset.open(shards.prepare(str(tmp_path / "s.csv"), tmp_path / "cache")).num_samples == 1
    assert "null byte" in caplog.text
    assert "File name too long" in caplog.text


def test_bad_tars_name_the_key_too(tarred, tmp_path):
    Path(tarred / "a.tar").write_bytes(b"garbage" * 1000)
    with pytest.raises(ConfigError, match=r"^data\.source=.*no usable image in 1 tars"):
        shards.prepare(str(tarred), tmp_path / "cache")
