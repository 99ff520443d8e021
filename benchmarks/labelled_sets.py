"""The real labelled images of ../shared/data as folders that distssl packs: annotations beside the images.

`prepare(out)` gives the sets by name, each a train and a test folder, packed. Grocery and clothing are photos.py's.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import photos
import scenes
from photos import Split

from distssl.data import indexing, shards

CELLS = ("RBC", "WBC", "Platelets")  # BCCD's classes, in the order of their numbers
MICE = {"openfield": 4, "mirror_mouse": 17, "reaching": 5}  # points
TEST_BLOCK = 5  # the last of so many blocks of a video is the test: neighbouring frames do not straddle
NUM_SCENES = {"train": 800, "test": 200}

Files = Iterator[tuple[str, bytes]]  # name, content


def prepare(out: Path) -> dict[str, Split]:
    """nuclei (masks), bccd (boxes), the mice (keypoints) and scenes (depth)."""
    source = photos.find_data()
    made: dict[str, Callable[[str], Files]] = {
        "nuclei": lambda part: _nuclei(source / "nuclei_cc0_s192.zip", part),
        "bccd": lambda part: _bccd(source / "bccd_mit.zip", part),
        **{mouse: lambda part, mouse=mouse: _mouse(source / "keypoints_mouse.zip", mouse, part) for mouse in MICE},
    }
    found = {
        name: Split(*(_packed(out, name, part, files) for part in ("train", "test"))) for name, files in made.items()
    }
    return found | {"scenes": Split(*(_packed_scenes(out, part) for part in ("train", "test")))}


def _packed(out: Path, name: str, part: str, files: Callable[[str], Files]) -> Path:
    folder = out / "packed" / f"{name}_{part}"
    if not (folder / indexing.DATASET).exists():
        print(f"packing {name}, {part}", flush=True)
        images = out / "labelled" / name / part
        for path, content in files(part):
            (images / path).parent.mkdir(parents=True, exist_ok=True)
            (images / path).write_bytes(content)
        shards.pack(str(images), folder)
    return folder


def _packed_scenes(out: Path, part: str) -> Path:
    folder = out / "packed" / f"scenes_{part}"
    if not (folder / indexing.DATASET).exists():
        print(f"drawing scenes, {part}", flush=True)
        shards.pack(str(scenes.write(out / "labelled" / "scenes" / part, NUM_SCENES[part], seed=len(part))), folder)
    return folder


def _nuclei(path: Path, part: str) -> Files:
    """Masks lie beside the images as KEY.png: 1 is a nucleus, 0 is none."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.startswith(f"{part}/") and name.endswith((".jpg", ".png")):
                yield Path(name).name.replace(".png", ".mask.png"), archive.read(name)


def _bccd(path: Path, part: str) -> Files:
    """train is ImageSets' train and val; boxes are cut at the images' edges, and left out where nothing remains."""
    with zipfile.ZipFile(path) as archive:
        lists = {"train": ("train", "val"), "test": ("test",)}[part]
        keys = [key for name in lists for key in archive.read(f"ImageSets/{name}.txt").decode().split()]
        for key in keys:
            yield f"{key}.jpg", archive.read(f"JPEGImages/{key}.jpg")
            root = ElementTree.fromstring(archive.read(f"Annotations/{key}.xml"))
            yield f"{key}.boxes.json", json.dumps(list(_boxes(root))).encode()


def _boxes(root: ElementTree.Element) -> Iterator[dict]:
    width, height = (int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
    for found in root.iter("object"):
        x0, y0, x1, y1 = (int(found.findtext(f"bndbox/{side}", "0")) for side in ("xmin", "ymin", "xmax", "ymax"))
        box = [max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)]
        if box[0] < box[2] and box[1] < box[3]:
            yield {"label": CELLS.index(found.findtext("name", "")), "box": box}


def _mouse(path: Path, mouse: str, part: str) -> Files:
    with zipfile.ZipFile(path) as archive:
        rows = list(csv.reader(io.TextIOWrapper(archive.open(f"{mouse}/keypoints.csv"))))[3:]
        first = len(rows) * (TEST_BLOCK - 1) // TEST_BLOCK
        for name, *values in rows[:first] if part == "train" else rows[first:]:
            key = Path(name).stem
            image = next(
                entry for entry in archive.namelist() if entry.startswith(f"{mouse}/") and Path(entry).stem == key
            )
            yield f"{key}{Path(image).suffix}", archive.read(image)
            points = [_point(x, y) for x, y in zip(values[::2], values[1::2], strict=True)]
            yield f"{key}.keypoints.json", json.dumps(points).encode()


def _point(x: str, y: str) -> list[float]:
    """A blank is hidden."""
    return [float(x), float(y), 1] if x.strip() and y.strip() else [0, 0, 0]
