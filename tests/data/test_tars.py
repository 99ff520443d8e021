"""Tars: whatever is in them, the good samples are found where they lie and the rest is named, never fatal."""

from __future__ import annotations

import gc
import gzip
import io
import subprocess
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from distssl.data import expansion, tars
from distssl.errors import ConfigError
from tests import planted


def picture(number: int = 0, name: str = "JPEG", size=(12, 9)) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, name)
    return file.getvalue()


def write(path: Path, *members: tuple[str, bytes]) -> Path:
    return planted.write_tar(path, list(members))


def scan(path: Path, **options) -> tars.Scan:
    return tars.scan(path, **{"max_pixels": 10**6, **options})


def keys(result: tars.Scan) -> list[str]:
    return [row[0] for row in result.rows]


def reasons(result: tars.Scan) -> list[tuple[str, str]]:
    return [(rejected.key, rejected.reason) for rejected in result.rejected]


def test_rows_point_at_the_bytes_in_any_format_and_case(tmp_path):
    formats = {"jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "TIF": "TIFF", "tiff": "TIFF"}
    formats["jp2"] = "JPEG2000"
    data = {suffix: picture(i, name) for i, (suffix, name) in enumerate(formats.items())}
    path = write(tmp_path / "a.tar", *((f"d/{suffix}_key.{suffix}", image) for suffix, image in data.items()))
    result = scan(path)
    assert reasons(result) == []
    whole = path.read_bytes()
    assert result.num_bytes == len(whole)
    for (key, offset, size, height, width, label, *_), suffix in zip(result.rows, data, strict=True):
        assert key == f"d/{suffix}_key"
        assert whole[offset : offset + size] == data[suffix]
        assert (height, width, label) == (9, 12, -1)


@pytest.mark.parametrize("style", ["pax", "gnu", "ustar"])
def test_tars_of_the_tar_command_with_long_and_foreign_names(style, tmp_path):
    names = ["ein Bild äöü.jpg", "日本/写真.jpg", "plain.jpg"] + (
        ["x" * 40 + "/" + "y" * 180 + ".jpg"] if style != "ustar" else []
    )
    for i, name in enumerate(names):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_bytes(picture(i))
    (tmp_path / "s/empty folder").mkdir()
    (tmp_path / "s/link.jpg").symlink_to("plain.jpg")
    subprocess.run(["tar", f"--format={style}", "-cf", tmp_path / "a.tar", "-C", tmp_path / "s", "."], check=True)
    result = scan(tmp_path / "a.tar")
    assert sorted(keys(result)) == sorted("./" + name.removesuffix(".jpg") for name in names)
    assert [key for key, _ in reasons(result)] == ["./link.jpg"]
    whole = (tmp_path / "a.tar").read_bytes()
    found = {key: whole[offset : offset + size] for key, offset, size, *_ in result.rows}
    assert found == {"./" + name.removesuffix(".jpg"): (tmp_path / "s" / name).read_bytes() for name in names}


def test_a_name_that_is_not_utf8_is_kept_readable(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin1") as tar:
        info = tarfile.TarInfo("caf\xe9.jpg")
        info.size = len(picture())
        tar.addfile(info, io.BytesIO(picture()))
    (key,) = keys(scan(tmp_path / "a.tar"))
    assert key.encode("utf-8").startswith(b"caf")


def test_samples_are_grouped_as_webdataset_groups_them(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for i in range(6):
            writer.write(
                {"__key__": f"a.b/{i:03d}", "jpg": picture(i), "mask.png": picture(i, "PNG"), "cls": str(i).encode()}
            )
    result = scan(tmp_path / "a.tar")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
        gc.collect()
    assert keys(result) == [sample["__key__"] for sample in samples]
    whole = (tmp_path / "a.tar").read_bytes()
    assert [whole[row[1] : row[1] + row[2]] for row in result.rows] == [sample["jpg"] for sample in samples]
    assert [row[5] for row in result.rows] == list(range(6))


def test_bad_samples_are_named_and_the_others_kept(tmp_path):
    path = write(
        tmp_path / "a.tar",
        ("good1.jpg", picture(1)),
        ("zero.jpg", b""),
        ("gif.jpg", picture(2, "GIF")),
        ("avif.jpg", b"\0\0\0\x1cftypavif" + bytes(50)),
        ("html.jpg", b"<!DOCTYPE html><p>404</p>"),
        ("garbage.jpg", b"garbage" * 30),
        ("textonly.txt", b"hello"),
        ("good2.png", picture(3, "PNG")),
        ("good2.png", picture(4, "PNG")),
        ("good1.jpg", picture(5)),
        ("large.png", picture(6, "PNG", size=(40, 30))),
        ("__meta__/a.jpg", picture(7)),
        ("README", b"no suffix at all"),
        ("good3.JPG", picture(8)),
    )
    result = scan(path, max_pixels=1000)
    assert keys(result) == ["good1", "good2", "good3"]
    whole = path.read_bytes()
    assert whole[result.rows[0][1] :].startswith(picture(1))
    assert whole[result.rows[1][1] :].startswith(picture(3, "PNG"))
    assert reasons(result) == [
        ("zero", "zero bytes"),
        ("gif", "GIF is not supported"),
        ("avif", "AVIF (ISO media) is not supported"),
        ("html", "markup (HTML or XML), not an image"),
        ("garbage", "not an image (starts with 67 61 72 62 61 67 65 67)"),
        ("textonly", "no image member, only txt"),
        ("good2", "duplicate key"),
        ("good1", "duplicate key"),
        ("large", "40x30 is more than max_pixels=1000"),
    ]


def test_labels_that_are_no_class_number_leave_the_sample_unlabelled(tmp_path):
    labels = {
        "a": b"3",
        "b": b" 0\n",
        "c": b"cat",
        "d": b"",
        "e": b"1.5",
        "f": b"-1",
        "g": b"-7",
        "h": b"99999999999",
        "i": b"\xff",
    }
    members = [member for key, label in labels.items() for member in ((f"{key}.jpg", picture()), (f"{key}.cls", label))]
    result = scan(write(tmp_path / "a.tar", *members))
    assert [row[5] for row in result.rows] == [3, 0, -1, -1, -1, -1, -1, -1, -1]
    assert result.bad_labels == 6


@pytest.mark.parametrize("kept", range(4))
@pytest.mark.parametrize("where", ["in the header", "after the header", "in the data", "before the next"])
def test_a_cut_tar_gives_the_samples_before_the_cut(kept, where, tmp_path):
    path = write(tmp_path / "a.tar", *((f"{i}.jpg", picture(i)) for i in range(4)))
    start = [row[1] - 512 for row in scan(path).rows][kept]
    step = {
        "in the header": 100,
        "after the header": 512,
        "in the data": 600,
        "before the next": 512 + len(picture(kept)),
    }
    path.write_bytes(path.read_bytes()[: start + step[where]])
    result = scan(path)
    assert keys(result) == [str(i) for i in range(kept + (where == "before the next"))]
    assert [rejected.kind for rejected in result.rejected] == (
        ["not a tar"] if (kept, where) == (0, "in the header") else ["tar is cut"]
    )


def test_a_damaged_header_in_the_middle_is_named(tmp_path):
    path = write(tmp_path / "a.tar", *((f"{i}.jpg", picture(i)) for i in range(4)))
    at = scan(path).rows[2][1] - 512
    data = bytearray(path.read_bytes())
    data[at : at + 512] = b"x" * 512
    path.write_bytes(data)
    result = scan(path)
    assert keys(result) == ["0", "1"]
    assert reasons(result) == [("", f"tar is damaged at byte {at}: what follows is left out")]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_compressed_tar_is_told_apart(name, tmp_path):
    path = write(tmp_path / "plain.tar", ("a.jpg", picture()))
    (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
    assert reasons(scan(tmp_path / name)) == [("", "gzip-compressed: decompress it")]


def test_a_member_named_like_a_compression_magic_does_not_make_a_tar_compressed(tmp_path):
    assert keys(scan(write(tmp_path / "a.tar", ("BZ2.jpg", picture())))) == ["BZ2"]


def test_files_that_are_no_tars_are_named(tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "garbage.tar").write_bytes(b"garbage" * 1000)
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "dangling.tar").symlink_to("nowhere")
    write(tmp_path / "nothing.tar")
    says = {
        "empty": "no samples",
        "garbage": "not a tar",
        "folder": "cannot be read: Is a directory",
        "dangling": "cannot be read: No such file",
        "nothing": "no samples",
    }
    for name, reason in says.items():
        result = scan(tmp_path / f"{name}.tar")
        assert result.rows == []
        ((key, told),) = reasons(result)
        assert key == ""
        assert told.startswith(reason)


@pytest.mark.parametrize("num_before", [0, 2])
def test_headers_of_headers_without_end_are_named(num_before, tmp_path):
    path = write(tmp_path / "a.tar", *((f"{i}.jpg", picture(i)) for i in range(num_before)))
    end = sum(512 + -(-len(picture(i)) // 512) * 512 for i in range(num_before))
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 5
    nested = 2000 * (long_name.tobuf(tarfile.GNU_FORMAT) + b"a.jpg".ljust(512, b"\0"))
    path.write_bytes(path.read_bytes()[:end] + nested)
    result = scan(path)
    assert keys(result) == [str(i) for i in range(num_before)]
    assert [rejected.kind for rejected in result.rejected] == ["tar is damaged" if num_before else "not a tar"]


def test_random_damage_is_never_fatal(tmp_path):
    path = write(tmp_path / "a.tar", *((f"{'n' * 120}{i}.jpg", picture(i)) for i in range(4)))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for at in rng.integers(0, max(1, len(data)), 30):
            data[at : at + 1] = bytes([rng.integers(256)])
        path.write_bytes(data)
        for _, offset, size, *_ in scan(path).rows:
            assert offset + size <= len(data)


@pytest.mark.parametrize("pattern", ["", "a-*.tar", "a-{000..002}.tar", "a-00{0,1,2}.tar", "{a-000,a-00[12]}.tar"])
def test_a_url_is_a_folder_a_glob_or_a_brace_pattern(pattern, tmp_path):
    found = [write(tmp_path / f"a-{i:03d}.tar", ("a.jpg", picture())) for i in (2, 0, 1)]
    assert expansion.expand(str(tmp_path / pattern)) == sorted(found)


@pytest.mark.parametrize(
    "url", ["nowhere", "nowhere/*.tar", "empty", "a-{0..3}.tar", "s4://bucket/*.tar", "http://localhost/a", "a-{0.tar"]
)
def test_a_url_that_names_no_tar_is_the_users_mistake(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data\.source="):
        expansion.expand(url, key="data.source")
