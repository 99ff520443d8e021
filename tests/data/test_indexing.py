"""index: other people's tars, where they lie; resumable, never destroying an index that is there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distssl.data import indexing, shards, tars
from distssl.errors import ConfigError
from tests import planted


def picture(number: int, size=(12, 9)) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def write(path: Path, *members: tuple[str, bytes]) -> Path:
    return planted.write_tar(path, list(members))


@pytest.fixture
def folder(tmp_path):
    """Three good tars of 4, 5 and 6 samples, the second labelled, and one that is garbage."""
    (tmp_path / "t").mkdir()
    for shard, n in enumerate((4, 5, 6)):
        members = []
        for i in range(n):
            members += [(f"{shard}-{i}.jpg", picture(10 * shard + i))] + (
                [(f"{shard}-{i}.cls", b"%d" % i)] if shard == 1 else []
            )
        write(tmp_path / f"t/a-{shard}.tar", *members)
    (tmp_path / "t/a-garbage.tar").write_bytes(b"garbage" * 999)
    return tmp_path / "t"


def state(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_index_describes_the_shards_and_what_was_rejected(folder):
    assert shards.index(str(folder)) == folder
    described = json.loads((folder / "dataset.json").read_text())
    for entry, name, n in zip(described["shards"], ("a-0.tar", "a-1.tar", "a-2.tar"), (4, 5, 6), strict=True):
        data = (folder / name).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        assert entry == {"path": name, "bytes": len(data), "sha256": sha256, "samples": n}
    assert described["samples"] == 15
    assert described["labelled"] == 5
    assert described["classes"] == ["0", "1", "2", "3", "4"]
    assert described["rejected"]["by_reason"] == {"not a tar": 1}
    (line,) = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert (line["shard"], line["offset"], line["key"]) == ("a-garbage.tar", 0, "")
    assert "not a tar" in line["reason"]
    file = pq.ParquetFile(folder / "index.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 5, 6]
    assert file.schema_arrow.equals(indexing.INDEX_SCHEMA)
    assert file.read(columns=["shard"]).column("shard").to_pylist() == [0] * 4 + [1] * 5 + [2] * 6


KILLED = """
import os, signal, sys
from pathlib import Path
from distssl.data import indexing
def die(done, total):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
indexing.index(sys.argv[1], Path(sys.argv[2]), progress=die)
"""


def test_a_killed_indexing_goes_on_where_it_was_and_ends_the_same(folder, tmp_path, monkeypatch):
    whole = shards.Dataset.open(shards.index(str(folder), tmp_path / "whole"))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out/dataset.json").exists()
    scanned, scan = [], tars.scan
    monkeypatch.setattr(tars, "scan", lambda path, **options: (scanned.append(path.name), scan(path, **options))[1])
    again = shards.Dataset.open(shards.index(str(folder), tmp_path / "out"))
    assert scanned == ["a-2.tar", "a-garbage.tar"]
    assert again.fingerprint == whole.fingerprint
    assert (tmp_path / "out/dataset.json").read_bytes() == (tmp_path / "whole/dataset.json").read_bytes()


def test_added_tars_keep_the_ids_and_a_damaged_part_is_read_again(folder):
    before = shards.Dataset.open(shards.index(str(folder)))
    write(folder / "b.tar", ("new.jpg", picture(99)))
    next((folder / indexing.PARTS).iterdir()).write_bytes(b"half")
    after = shards.Dataset.open(shards.index(str(folder)))
    ids = np.arange(15)
    assert after.keys(ids) == before.keys(ids)
    assert after.num_samples == 16
    assert after.fingerprint != before.fingerprint


def test_the_fingerprint_is_of_the_content_not_of_the_place(folder, tmp_path):
    here = shards.Dataset.open(shards.index(str(folder)))
    shutil.copytree(folder, tmp_path / "moved")
    moved = shards.Dataset.open(tmp_path / "moved")
    assert moved.shard_paths == [tmp_path / f"moved/a-{i}.tar" for i in range(3)]
    assert moved.fingerprint == here.fingerprint
    elsewhere = shards.Dataset.open(shards.index(str(folder / "a-*.tar"), tmp_path / "elsewhere"))
    assert elsewhere.fingerprint == here.fingerprint
    assert elsewhere.shard_paths == here.shard_paths
    write(folder / "a-0.tar", *((f"0-{i}.jpg", picture(50 + i)) for i in range(4)))
    assert shards.Dataset.open(shards.index(str(folder))).fingerprint != here.fingerprint


def test_verify_rejects_what_does_not_decode(folder, tmp_path):
    cut = picture(0, size=(60, 40))
    write(folder / "a-3.tar", ("cut.jpg", cut[: len(cut) // 2]), ("whole.jpg", cut))
    assert shards.Dataset.open(shards.index(str(folder), tmp_path / "lazy")).num_samples == 17
    strict = shards.index(str(folder), tmp_path / "strict", verify=True)
    assert shards.Dataset.open(strict).num_samples == 16
    assert '"key": "cut"' in (strict / "rejected.jsonl").read_text()


def test_class_names_of_our_tars_are_known_to_an_index_elsewhere(tmp_path):
    for name in ("dog", "cat"):
        (tmp_path / "s" / name).mkdir(parents=True)
        (tmp_path / "s" / name / "a.jpg").write_bytes(picture(len(name)))
    out = shards.pack(str(tmp_path / "s"), tmp_path / "out")
    assert shards.Dataset.open(shards.index(str(out), tmp_path / "elsewhere")).classes == ("cat", "dog")


def labelled(folder: Path, classes: list[str] | None) -> None:
    """A tar of a picture of each of two classes, with the names `pack` gives them, if any."""
    write(folder / "a.tar", *(member for i in (0, 1) for member in ((f"{i}.jpg", picture(i)), (f"{i}.cls", b"%d" % i))))
    if classes is not None:
        (folder / "pack.json").write_text(json.dumps({"classes": classes}))


@pytest.mark.parametrize("other", [["car", "dog"], ["cat", "dog", "emu"], None])
def test_folders_whose_classes_differ_are_not_indexed_as_one(other, tmp_path):
    labelled(tmp_path / "a", ["cat", "dog"])
    labelled(tmp_path / "b", other)
    with pytest.raises(ConfigError, match=f"class . is .* in {tmp_path}/a and .* in {tmp_path}/b; ") as caught:
        shards.index(str(tmp_path / "{a,b}/*.tar"), tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out/dataset.json").exists()


def test_folders_with_the_same_classes_and_one_without_labels_are_indexed_as_one(tmp_path):
    write(tmp_path / "0/a.tar", ("a.jpg", picture(9)))
    for name in "ab":
        labelled(tmp_path / name, ["cat", "dog"])
    dataset = shards.Dataset.open(shards.index(str(tmp_path / "{0,a,b}/*.tar"), tmp_path / "out"))
    assert dataset.classes == ("cat", "dog")
    assert dataset.num_samples == 5


@pytest.mark.parametrize("text", ["[]", '["cat"]', '{"classes": 3}', '{"classes": "cats"}', "nonsense"])
def test_a_pack_json_of_something_else_names_no_classes(text, tmp_path):
    labelled(tmp_path / "a", None)
    (tmp_path / "a/pack.json").write_text(text)
    assert shards.Dataset.open(shards.index(str(tmp_path / "a"))).classes == ("0", "1")


def test_a_pack_json_that_cannot_be_read_is_one_line(tmp_path):
    labelled(tmp_path / "a", None)
    (tmp_path / "a/pack.json").mkdir()
    with pytest.raises(ConfigError, match=r"a/pack\.json: cannot be read: Is a directory"):
        shards.index(str(tmp_path / "a"))


def test_max_pixels_is_an_option(folder, tmp_path):
    write(folder / "a-3.tar", ("large.jpg", picture(0, size=(60, 40))))
    dataset = shards.Dataset.open(shards.index(str(folder), tmp_path / "out", max_pixels=2399))
    assert dataset.num_samples == 15
    described = json.loads((tmp_path / "out/dataset.json").read_text())
    assert described["rejected"]["by_reason"]["more than max_pixels"] == 1


@pytest.mark.parametrize("pattern", ["a-0.tar", "a-[01].tar", "a-{0,1}.tar"])
def test_some_of_a_folders_tars_do_not_take_the_folders_index(pattern, folder):
    shards.index(str(folder))
    before = {name: (folder / name).read_bytes() for name in ("dataset.json", "index.parquet", "rejected.jsonl")}
    out = shards.index(str(folder / pattern))
    assert out.parent == folder
    assert out != folder
    assert shards.Dataset.open(out).shard_paths[0] == folder / "a-0.tar"
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_an_index_of_other_tars_is_not_replaced(folder, tmp_path):
    shards.index(str(folder), tmp_path / "out")
    before = state(tmp_path / "out")
    with pytest.raises(ConfigError, match="holds the index of other tars"):
        shards.index(str(folder / "a-0.tar"), tmp_path / "out")
    assert state(tmp_path / "out") == before


def test_tars_are_compared_with_those_of_the_index_in_linear_time(tmp_path):
    class Counted(list):
        iterations = 0

        def __iter__(self):
            self.iterations += 1
            return super().__iter__()

    paths = Counted(tmp_path / f"{i}.tar" for i in range(9))
    indexing._refuse_other_shards(paths, list(paths), tmp_path, 1.0)
    assert paths.iterations == 2  # one of them is this test's


def test_an_index_stays_when_nothing_is_usable_any_more(folder):
    shards.index(str(folder))
    before = {name: (folder / name).read_bytes() for name in ("dataset.json", "index.parquet", "rejected.jsonl")}
    for path in folder.glob("*.tar"):
        path.write_bytes(b"garbage" * 999)
    with pytest.raises(ConfigError, match=r"no usable image in 4 tars; the first: a-0\.tar: not a tar"):
        shards.index(str(folder))
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_a_disk_that_is_full_leaves_the_old_index(folder):
    shards.index(str(folder))
    before = {name: (folder / name).read_bytes() for name in ("dataset.json", "index.parquet", "rejected.jsonl")}
    write(folder / "b.tar", ("new.jpg", picture(99)))
    (folder / ".index.parquet.part").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="the disk is full"):
        shards.index(str(folder))
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert shards.Dataset.open(shards.index(str(folder))).num_samples == 16


def test_out_must_be_given_where_the_tars_own_folder_will_not_do(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "u")
    with pytest.raises(ConfigError, match=r"out: .* lies in 2 folders"):
        shards.index(str(tmp_path / "{t,u}/a-0.tar"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"out: .* cannot be written"):
        shards.index(str(folder))


def test_real_photos_give_the_sizes_that_pil_sees(tmp_path):
    photos = planted.real("clothing_cc0_originals_400.zip")
    if not photos.exists():
        pytest.skip(f"{photos} is not there (set DISTSSL_DATA)")
    with zipfile.ZipFile(photos) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png"))][:60]
        members = [(f"{i}.jpg", archive.read(name)) for i, name in enumerate(names)]
    (tmp_path / "t").mkdir()
    write(tmp_path / "t/photos.tar", *members)
    dataset = shards.Dataset.open(shards.index(str(tmp_path / "t"), verify=True))
    rows = dataset.rows(np.arange(len(members)))
    for (_, bytes_), height, width in zip(members, rows.height, rows.width, strict=True):
        with Image.open(io.BytesIO(bytes_)) as image:
            turned = image.getexif().get(274, 1) >= 5
            assert image.size == ((height, width) if turned else (width, height))


def test_an_index_that_was_verified_is_made_anew_as_it_was(folder, command):
    for options, verified in ((["--verify"], True), ([], True), (["--no-verify"], False)):
        assert command("index", folder, *options)[0] == 0
        assert json.loads((folder / "dataset.json").read_text())["verify"] is verified
