"""pack: the same bytes, in shards that plain webdataset reads, whatever interrupts it."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from distssl.data import digits, packing, shards
from distssl.errors import ConfigError

NAMES = [f"{'cat' if i % 3 else 'dog'}/IMG.{i:03d} ü.jpg" for i in range(40)]


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(NAMES):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return tmp_path / "photos"


def read_with_webdataset(out: Path) -> list[dict]:
    tars = sorted(map(str, out.glob("*.tar")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
        gc.collect()
    return samples


def state(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_webdataset_reads_every_file_byte_for_byte_with_its_label(folder, tmp_path):
    dataset = shards.Dataset.open(shards.pack(str(folder), tmp_path / "out"))
    samples = read_with_webdataset(tmp_path / "out")
    expected = {(folder / name).read_bytes(): int(name[0] == "d") for name in NAMES}
    assert {sample["jpg"]: int(sample["cls"]) for sample in samples} == expected
    assert [sample["__key__"] for sample in samples] == dataset.keys(np.arange(40))
    assert {sample["__key__"] for sample in samples} == {name.replace(".jpg", "").replace(".", "_") for name in NAMES}
    assert dataset.classes == ("cat", "dog")
    assert dataset.num_labelled == 40


def test_bytes_at_a_row_are_the_file(folder, tmp_path):
    dataset = shards.Dataset.open(shards.pack(str(folder), tmp_path / "out", samples_per_shard=7))
    ids = np.random.default_rng(0).permutation(40)
    rows = dataset.rows(ids)
    read = []
    for i in range(40):
        with open(dataset.shard_paths[rows.shard[i]], "rb") as file:
            file.seek(rows.offset[i])
            read.append(file.read(rows.size[i]))
    assert set(read) == {(folder / name).read_bytes() for name in NAMES}
    assert set(rows.height.tolist()) == {9}
    assert set(rows.width.tolist()) == {12}
    for data, key, label in zip(read, dataset.keys(ids), rows.label, strict=True):
        name = next(name for name in NAMES if name.replace(".jpg", "").replace(".", "_") == key)
        assert data == (folder / name).read_bytes()
        assert dataset.classes[label] == name.partition("/")[0]


def test_the_order_is_shuffled_and_depends_on_names_and_seed_only(folder, tmp_path):
    first = shards.Dataset.open(shards.pack(str(folder), tmp_path / "a"))
    shutil.copytree(folder, tmp_path / "copy")
    second = shards.Dataset.open(shards.pack(str(tmp_path / "copy"), tmp_path / "b"))
    other = shards.Dataset.open(shards.pack(str(folder), tmp_path / "c", seed=1))
    ids = np.arange(40)
    assert first.fingerprint == second.fingerprint
    assert first.keys(ids) == second.keys(ids)
    assert first.keys(ids) != other.keys(ids)
    assert first.keys(ids) != sorted(first.keys(ids))


@pytest.mark.parametrize(("n", "per_shard", "expected"), [(40, 10_000, 5), (40, 7, 6), (3, 10_000, 1), (40, 1, 40)])
def test_number_of_shards(n, per_shard, expected, tmp_path):
    (tmp_path / "s").mkdir()
    for i in range(n):
        (tmp_path / f"s/{i}.jpg").write_bytes(picture(i))
    dataset = shards.Dataset.open(shards.pack(str(tmp_path / "s"), tmp_path / "out", samples_per_shard=per_shard))
    assert len(dataset.shard_paths) == expected
    assert np.diff(dataset.shard_first).max() - np.diff(dataset.shard_first).min() <= 1


def test_the_suffix_is_the_formats_own_and_names_that_differ_in_it_stay_apart(tmp_path):
    names = ["a.jpg", "a.JPEG", "a.b.jpg", "a_b.jpg", "__x__.jpg", "line\nbreak.jpg"]
    (tmp_path / "s").mkdir()
    for i, name in enumerate(names):
        (tmp_path / "s" / name).write_bytes(picture(i))
    Image.new("RGB", (5, 5)).save(tmp_path / "s/liar.jpg", "PNG")
    shards.pack(str(tmp_path / "s"), tmp_path / "out")
    samples = read_with_webdataset(tmp_path / "out")
    assert len(samples) == len({sample["__key__"] for sample in samples}) == len(names) + 1
    assert {sample["png"] for sample in samples if "png" in sample} == {(tmp_path / "s/liar.jpg").read_bytes()}


def test_what_is_no_image_is_named_and_left_out(folder, tmp_path, caplog):
    (folder / "cat/broken.jpg").write_bytes(b"<html>not found</html>")
    (folder / "cat/zero.jpg").write_bytes(b"")
    (folder / "cat/dangling.jpg").symlink_to("nowhere")
    dataset = shards.Dataset.open(shards.pack(str(folder), tmp_path / "out"))
    assert dataset.num_samples == 40
    for name, reason in (("broken.jpg", "HTML"), ("zero.jpg", "zero bytes"), ("dangling.jpg", "No such file")):
        assert any(name in line and reason in line for line in caplog.messages)


def test_a_source_of_broken_files_leaves_no_shard_behind(tmp_path):
    (tmp_path / "s").mkdir()
    for i in range(20):
        (tmp_path / f"s/{i}.jpg").write_bytes(b"junk")
    with pytest.raises(ConfigError, match="none of its 20 files is an image"):
        shards.pack(str(tmp_path / "s"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))
    (tmp_path / "s/0.jpg").write_bytes(picture(0))
    assert shards.Dataset.open(shards.pack(str(tmp_path / "s"), tmp_path / "out")).num_samples == 1


KILLED = """
import os, signal, sys
from distssl.data import images, shards
read, calls = images.read_header, 0
def read_then_die(data):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return read(data)
images.read_header = read_then_die
shards.pack(sys.argv[1], __import__("pathlib").Path(sys.argv[2]))
"""


@pytest.mark.parametrize("at", [12, 55], ids=["while a shard is written", "while the shards are indexed"])
def test_a_killed_packing_goes_on_and_ends_the_same(at, folder, tmp_path):
    whole = shards.Dataset.open(shards.pack(str(folder), tmp_path / "whole"))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(tmp_path / "out"), str(at)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out/dataset.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert len(before) == (1 if at == 12 else 5)
    again = shards.Dataset.open(shards.pack(str(folder), tmp_path / "out"))
    assert again.fingerprint == whole.fingerprint
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}.items()
    assert not list((tmp_path / "out").rglob("*.part"))


def test_another_source_in_the_same_place_is_refused_and_nothing_changes(folder, tmp_path):
    shards.pack(str(folder), tmp_path / "out")
    before = state(tmp_path / "out")
    (folder / "cat/new.jpg").write_bytes(picture(99))
    with pytest.raises(ConfigError, match="holds shards of another source"):
        shards.pack(str(folder), tmp_path / "out")
    assert state(tmp_path / "out") == before


def test_a_folder_of_somebody_elses_tars_is_refused(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/theirs.tar").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="not packed here"):
        shards.pack(str(folder), tmp_path / "out")
    assert (tmp_path / "out/theirs.tar").read_bytes() == b"precious"


def test_a_folder_with_a_pack_json_of_something_else_is_packed_into(folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/pack.json").write_text("[]")
    assert shards.Dataset.open(shards.pack(str(folder), tmp_path / "out")).num_samples == 40


def test_a_source_whose_name_is_too_long_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^source=(long)+: cannot be read: File name too long"):
        shards.pack("long" * 80, tmp_path / "out")


def test_packing_into_the_source_itself_is_refused(folder):
    with pytest.raises(ConfigError, match="lies inside"):
        shards.pack(str(folder), folder / "out")


def test_too_little_disk_is_told_before_anything_is_written(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        ConfigError, match=rf"{tmp_path / 'out'}: not enough disk space: [\d,]+ bytes needed, 10,000 free"
    ):
        shards.pack(str(folder), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_disk_that_fills_up_leaves_no_half_shard_and_the_next_run_goes_on(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".shard-000002.tar.part").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"shard-000002.tar: the disk is full: .* more needed, [\d,]+ free"):
        shards.pack(str(folder), out)
    assert sorted(path.name for path in out.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    assert not (out / "dataset.json").exists()
    assert shards.Dataset.open(shards.pack(str(folder), out)).num_samples == 40


def test_a_place_that_cannot_be_made_is_told(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        shards.pack(str(folder), tmp_path / "file/out")


def test_progress_counts_to_the_end(folder, tmp_path):
    seen = []
    shards.pack(str(folder), tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(8, 40), (16, 40), (24, 40), (32, 40), (40, 40)]


def test_the_digits_are_packed_with_their_classes(tmp_path):
    dataset = shards.Dataset.open(shards.pack("scattered_digits:test", tmp_path / "out"))
    assert dataset.classes == tuple("0123456789")
    num_images = digits.TEST_DIGITS * digits.SCATTERINGS["test"]
    assert dataset.num_labelled == dataset.num_samples == num_images
    assert json.loads((tmp_path / "out/dataset.json").read_text())["shards"][0]["path"] == "shard-000000.tar"
    assert len(dataset.shard_paths) == packing.MIN_SHARDS
