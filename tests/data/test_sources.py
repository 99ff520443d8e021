"""Sources: folders, zips, CSVs, torchvision's data sets; which labels they give and how mistakes are told."""

from __future__ import annotations

import errno
import io
import struct
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distssl import atomic
from distssl.data import images, sources
from distssl.errors import ConfigError


def picture(number: int, name: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(file, name)
    return file.getvalue()


def lay(root: Path, *names: str) -> dict[str, bytes]:
    made = {}
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
        made[name] = path.read_bytes()
    return made


def content(source: sources.Source) -> dict[str, tuple[bytes, int]]:
    return {name: source.read(i) for i, name in enumerate(source.names)}


def open_source(source, tmp_path: Path) -> sources.Source:
    return sources.open_source(str(source), tmp_path / "downloads", key="data.source")


def test_folders_one_level_deep_are_classes_and_stray_text_does_not_change_that(tmp_path):
    made = lay(tmp_path / "s", "dog/b.jpg", "cat/a.b.JPG", "dog/c.jpg")
    (tmp_path / "s/README.md").write_text("hello")
    (tmp_path / "s/.hidden.jpg").write_bytes(b"x")
    source = open_source(tmp_path / "s", tmp_path)
    assert source.classes == ("cat", "dog")
    assert content(source) == {name: (data, int(name[0] == "d")) for name, data in made.items()}


@pytest.mark.parametrize(
    "names", [["a.jpg", "b.jpg"], ["x/a.jpg", "x/b.jpg"], ["x/a.jpg", "b.jpg"], ["x/1/a.jpg", "y/b.jpg"]]
)
def test_any_other_shape_of_folder_is_unlabelled(names, tmp_path):
    lay(tmp_path / "s", *names)
    source = open_source(tmp_path / "s", tmp_path)
    assert source.classes == ()
    assert {label for _, label in content(source).values()} == {-1}


def test_an_image_without_an_extension_is_found_by_its_magic(tmp_path, caplog):
    lay(tmp_path / "s", "scan_0001", "b.jpg")
    (tmp_path / "s/notes").write_text("no image at all")
    assert list(open_source(tmp_path / "s", tmp_path).names) == ["b.jpg", "scan_0001"]
    assert "notes" in caplog.text


def test_loops_of_links_end(tmp_path):
    lay(tmp_path / "s", "a/x.jpg")
    (tmp_path / "s/a/loop").symlink_to(tmp_path / "s", target_is_directory=True)
    assert list(open_source(tmp_path / "s", tmp_path).names) == ["a/x.jpg"]


def test_a_zip_is_the_folder_in_it(tmp_path):
    made = lay(tmp_path / "s/photos", "dog/b.jpg", "cat/a.jpg", "cat/ä ö.jpg")
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name, data in made.items():
            archive.writestr(f"photos/{name}", data)
        archive.writestr("__MACOSX/photos/._a.jpg", b"x")
        archive.writestr("photos/readme.txt", b"hello")
    source = open_source(tmp_path / "s.zip", tmp_path)
    assert source.classes == ("cat", "dog")
    assert content(source) == content(open_source(tmp_path / "s/photos", tmp_path))


@pytest.mark.parametrize(
    ("header", "delimiter"),
    [("path,label", ","), ("Filename;Class", ";"), ("id\timage\tcategory".replace("id\t", ""), "\t")],
)
def test_a_csv_names_paths_and_classes(header, delimiter, tmp_path):
    made = lay(tmp_path, "d/a.jpg", "d/b.jpg", "d/c.jpg")
    lines = [
        header,
        f"d/a.jpg{delimiter}zebra",
        f"d/b.jpg{delimiter}ant",
        f"d/c.jpg{delimiter}",
        f"gone.jpg{delimiter}ant",
    ]
    (tmp_path / "s.csv").write_text("\ufeff" + "\n".join(lines))
    source = open_source(tmp_path / "s.csv", tmp_path)
    assert source.classes == ("ant", "zebra")
    labels = {"d/a.jpg": 1, "d/b.jpg": 0, "d/c.jpg": -1}
    assert content(source) == {name: (made[name], label) for name, label in labels.items()}


@pytest.mark.parametrize(
    ("lines", "number"),
    [
        (["path,label", "a.jpg,cat", '"b.jpg,cat', "c.jpg,cat"], 3),
        (["path,label", "", 'a.jpg,"cat', 'b.jpg,"cat'], 3),
        (["path,label", '"a.jpg,cat', *["b.jpg,cat"] * 20_000], 2),  # more than the csv module takes for one field
        (['"path,label', "a.jpg,cat"], 1),
    ],
)
def test_a_quote_that_is_not_closed_does_not_swallow_rows(lines, number, tmp_path):
    lay(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "s.csv").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=rf"data\.source=.*: cannot be read from line {number} on: .*quote") as caught:
        open_source(tmp_path / "s.csv", tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_quotes_that_are_closed_hold_delimiters_and_quotes(tmp_path):
    made = lay(tmp_path, 'a, "b".jpg')
    (tmp_path / "s.csv").write_text('path,label\n"a, ""b"".jpg",cat\n')
    assert content(open_source(tmp_path / "s.csv", tmp_path)) == {'a, "b".jpg': (made['a, "b".jpg'], 0)}


def test_numbers_in_a_csv_are_sorted_as_numbers(tmp_path):
    lay(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "s.csv").write_text("file,label\na.jpg,10\nb.jpg,9\n")
    assert open_source(tmp_path / "s.csv", tmp_path).classes == ("9", "10")


def lay_mnist(downloads: Path) -> np.ndarray:
    """Five images to train with, the first three of them to test with: uint8 [N, H, W]."""
    raw = downloads / "MNIST/raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (5, 28, 28), dtype=np.uint8)
    for split, n in (("train", 5), ("t10k", 3)):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 28, 28) + pixels[:n].tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + bytes(range(n)))
    return pixels


def test_a_torchvision_data_set_is_found_in_any_case_and_its_pixels_come_as_png(tmp_path):
    pixels = lay_mnist(tmp_path / "downloads")
    source = open_source("mnist", tmp_path)
    assert len(source.names) == 5
    assert len(source.classes) == 10
    data, label = source.read(4)
    assert label == 4
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels[4])
    assert len(open_source("MNIST:test", tmp_path).names) == 3


def test_processes_that_want_the_same_download_take_turns(tmp_path, caplog):
    caplog.set_level("INFO")
    lay_mnist(tmp_path / "downloads")
    with ThreadPoolExecutor(1) as pool:  # the lock keeps threads apart as it does processes
        with atomic.locked(tmp_path / "downloads"):
            opened = pool.submit(open_source, "mnist", tmp_path)
            while "waiting for it" not in caplog.text and not opened.done():
                time.sleep(0.01)
            assert not opened.done()
        assert len(opened.result(timeout=60).names) == 5


def test_no_network_is_one_line_that_says_what_to_do(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a real refusal, at once
    with pytest.raises(
        ConfigError, match=r"data.source=cifar10: could not be downloaded .*Without a network, put"
    ) as caught:
        open_source("cifar10", tmp_path)
    assert len(caught.value.messages) == 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("cifar11", "Did you mean cifar10"),
        ("scattered_digit", "Did you mean scattered_digits"),
        ("no/such/folder", "does not exist"),
        ("gone.zip", "does not exist"),
        ("scattered_digits:val", "scattered_digits:test"),
        ("cifar10:val", "there are train and test"),
    ],
)
def test_a_name_that_is_nothing_is_told_with_what_is_possible(source, says, tmp_path):
    with pytest.raises(ConfigError, match=f"data.source={source}: .*{says}"):
        open_source(source, tmp_path)


def test_empty_and_imageless_sources_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("hello")
    (tmp_path / "plain.txt").write_text("hello")
    (tmp_path / "s.csv").write_text("who,label\na,b\n")
    (tmp_path / "gone.csv").write_text("path\nnowhere.jpg\n")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    for name, says in {
        "empty": "holds no image",
        "text": "holds no image",
        "empty.zip": "holds no image",
        "plain.txt": "no zip, CSV or tar",
        "s.csv": "no path column",
        "gone.csv": "none of its 1 paths exists",
    }.items():
        with pytest.raises(ConfigError, match=says):
            open_source(tmp_path / name, tmp_path)


@pytest.mark.parametrize("name", ["s.zip", "s.csv"])
def test_a_file_that_cannot_be_opened_is_not_taken_for_another_kind(name, tmp_path, monkeypatch):
    def refuse(path: Path, _mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(sources, "open", refuse, raising=False)
    with pytest.raises(ConfigError, match=r"data\.source=.*: cannot be read: Permission denied"):
        open_source(tmp_path / name, tmp_path)


def test_a_csv_whose_reading_fails_is_one_line(tmp_path):
    (tmp_path / "s.csv").symlink_to("/proc/self/mem")  # opens; its first byte is an I/O error
    with pytest.raises(ConfigError, match=r"data\.source=.*: cannot be read: Input/output error"):
        open_source(tmp_path / "s.csv", tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_entry_of_a_zip_is_named_and_the_others_are_read(method, tmp_path, caplog):
    with zipfile.ZipFile(tmp_path / "s.zip", "w", method) as archive:
        for i, name in enumerate(("a.jpg", "b.jpg", "without_suffix")):
            archive.writestr(name, picture(i))
        damaged = [archive.getinfo(name) for name in ("a.jpg", "without_suffix")]
    data = bytearray((tmp_path / "s.zip").read_bytes())
    for entry in damaged:
        at = entry.header_offset + 30 + len(entry.filename)
        data[at + 4 : at + entry.compress_size] = b"\xff" * (entry.compress_size - 4)
    (tmp_path / "s.zip").write_bytes(data)
    source = open_source(tmp_path / "s.zip", tmp_path)
    assert list(source.names) == ["a.jpg", "b.jpg"]
    assert "without_suffix" in caplog.text
    with pytest.raises(images.ImageError, match="damaged in the zip"):
        source.read(0)
    assert source.read(1) == (picture(1), -1)


def test_no_image_of_a_folder_is_left_out_for_an_error_that_may_pass(tmp_path, monkeypatch):
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(picture(i))
    source = open_source(tmp_path, tmp_path)
    (tmp_path / "0.jpg").unlink()
    with pytest.raises(images.ImageError, match="cannot be read: No such file"):
        source.read(0)

    def stale(self):
        raise OSError(errno.ESTALE, "Stale file handle", str(self))

    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(ConfigError, match=r"1\.jpg: cannot be read: Stale file handle"):
        source.read(1)


def test_a_home_of_nobody_is_a_name_like_another(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.source=~nosuchuser/x: does not exist"):
        open_source("~nosuchuser/x", tmp_path)


def test_no_image_of_a_zip_is_left_out_for_an_error_that_may_pass(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr("a.jpg", picture(0))
    source = open_source(tmp_path / "s.zip", tmp_path)

    def stale(self, entry):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(zipfile.ZipFile, "read", stale)
    with pytest.raises(ConfigError, match=r"s\.zip: cannot be read: Stale file handle"):
        source.read(0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [({6: 200}, "damaged zip"), ({28: 0, 32: len("a.jpg")}, "holds no image")],
    ids=["version", "the name is a comment"],
)
def test_a_zip_with_a_damaged_directory_is_one_line(changes, says, tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        archive.writestr("a.jpg", picture(0))
    data = bytearray((tmp_path / "s.zip").read_bytes())
    entry = data.index(b"PK\1\2")
    for at, value in changes.items():
        data[entry + at] = value
    (tmp_path / "s.zip").write_bytes(data)
    with pytest.raises(ConfigError, match=says):
        open_source(tmp_path / "s.zip", tmp_path)


def test_identity_changes_with_the_source_and_only_then(tmp_path):
    lay(tmp_path / "s", "a.jpg", "b.jpg")
    before = sources.identity(str(tmp_path / "s"))
    assert sources.identity(str(tmp_path / "s")) == before
    lay(tmp_path / "s", "c.jpg")
    assert sources.identity(str(tmp_path / "s")) != before
    assert sources.identity("cifar10") == sources.identity("CIFAR10")
