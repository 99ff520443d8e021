"""Headers: what is read from an image's first bytes is what PIL and DALI say after decoding it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from distssl.data import images
from distssl.data.probe import Probe

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "jp2": "JPEG2000"}


def encode(name: str, orientation: int = 0, size=(50, 30), mode: str = "RGB", **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file, exif = io.BytesIO(), Image.Exif()
    exif[images.EXIF_ORIENTATION] = orientation
    if orientation and name == "TIFF":
        options["tiffinfo"] = {images.EXIF_ORIENTATION: orientation}
    elif orientation:
        options["exif"] = exif
    Image.fromarray(noise).convert(mode).save(file, name, **options)
    return file.getvalue()


CASES = {
    **{f"{suffix} plain": (suffix, encode(name)) for suffix, name in FORMATS.items()},
    **{
        f"{suffix} orientation {o}": (suffix, encode(FORMATS[suffix], o))
        for suffix in ("jpg", "png", "webp", "tif")
        for o in (3, 5, 6, 8)
    },
    "jpg progressive": ("jpg", encode("JPEG", progressive=True)),
    "jpg cmyk": ("jpg", encode("JPEG", mode="CMYK")),
    "webp lossless": ("webp", encode("WEBP", lossless=True)),
    "webp lossless turned": ("webp", encode("WEBP", 6, lossless=True)),
    "webp with alpha": ("webp", encode("WEBP", mode="RGBA")),
    "png palette": ("png", encode("PNG", mode="P")),
    "png 16 bit": ("png", encode("PNG", mode="I;16")),
    "tif lzw": ("tif", encode("TIFF", compression="tiff_lzw")),
    "tif big": ("tif", encode("TIFF", big_tiff=True)),
    "jp2 codestream": ("jp2", encode("JPEG2000", no_jp2=True)),
}


@pytest.fixture(scope="module")
def peek():
    """DALI's own answer: (height, width) of an encoded image."""
    from nvidia.dali import fn, pipeline_def, types

    waiting: list[np.ndarray] = []

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        data = fn.external_source(source=lambda: [waiting.pop()], batch=True, dtype=types.UINT8, ndim=1)
        return fn.peek_image_shape(data), fn.decoders.image(data, output_type=types.RGB)

    pipeline = graph()
    pipeline.build()

    def ask(data: bytes):
        waiting.append(np.frombuffer(data, np.uint8))
        shape, image = pipeline.run()
        assert np.array(image[0]).shape[:2] == tuple(np.array(shape[0])[:2])
        return tuple(np.array(shape[0])[:2].tolist())

    return ask


@pytest.mark.parametrize("case", CASES)
def test_header_says_what_dali_decodes(case, peek):
    suffix, data = CASES[case]
    header = images.read_header(data)
    assert header.suffix == suffix
    assert (header.height, header.width) == peek(data)


@pytest.mark.parametrize("kind", ["after the pixels", "damaged"])
def test_exif_of_a_png_is_read_as_dali_reads_it(kind, peek):
    turned, plain = encode("PNG", 6), encode("PNG")
    at = turned.index(b"eXIf") - 4
    chunk = turned[at : at + 12 + int.from_bytes(turned[at : at + 4], "big")]
    data = plain[:-12] + chunk + plain[-12:]
    if kind == "damaged":
        data = turned.replace(chunk[8:16], b"II*\0\xff\xff\xff\xff")
    header = images.read_header(data)
    assert (header.height, header.width) == peek(data)
    assert (header.height > header.width) == (kind == "after the pixels")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "zero bytes"),
        (b"GIF89a" + bytes(30), "GIF"),
        (b"\0\0\0\x1cftypavif" + bytes(30), "AVIF"),
        (b"\n<!DOCTYPE html><html></html>", "HTML"),
        (b"garbage that is long enough", "not an image"),
        (b"\xff\xd8\xff\xd9", "no frame header"),
        (b"\xff\xd8\xff" + bytes(100), "cut or damaged"),
        (encode("PNG")[:16] + bytes(8) + encode("PNG")[24:], "0x0"),
    ],
)
def test_what_is_no_image_is_refused_by_its_name(data, says):
    with pytest.raises(images.ImageError, match=says):
        images.read_header(data)


@pytest.mark.parametrize("suffix", FORMATS)
def test_no_cut_or_changed_header_raises_anything_but_image_error(suffix):
    data = encode(FORMATS[suffix], 6 if suffix in ("jpg", "webp", "tif") else 0)
    rng = np.random.default_rng(0)
    for trial in range(600):
        broken = bytearray(data[: trial % 200] if trial < 200 else data)
        for at in rng.integers(0, min(300, max(1, len(broken))), 5 if trial >= 200 else 0):
            broken[at] = rng.integers(256)
        try:
            header = images.read_header(bytes(broken))
        except images.ImageError:
            continue
        assert header.height > 0
        assert header.width > 0


def test_probe_names_what_does_not_decode_and_goes_on():
    probe, good = Probe(), encode("JPEG")
    assert probe.problem(good) is None
    assert probe.problem(good[: len(good) // 2])
    assert probe.problem(b"")
    assert probe.problem(b"garbage" * 20)
    assert probe.problem(good) is None
