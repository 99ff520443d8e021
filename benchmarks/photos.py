"""The photos of peer_simclr: 8,038 to pretrain on, two labelled sets to probe with, prepared once.

Pretraining sees every photo of clothing_cc0_s224.zip, without its labels and those of the test senders among them, and
the training photos of grocery_mit_s128.zip. The zips are unpacked byte for byte into a folder of JPEGs, which lightly
reads as it is, and distssl packs the same files into tars.
"""

from __future__ import annotations

import csv
import io
import os
import random
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from distssl import atomic
from distssl.context import Context
from distssl.data import indexing, shards
from distssl.data.shards import Dataset
from distssl.downstream import classify, features, labels
from distssl.downstream.features import Features
from distssl.nn.backbones import Backbone

CLOTHING, GROCERY = "clothing_cc0_s224.zip", "grocery_mit_s128.zip"
NO_LABEL = ("Not sure", "Other", "Skip")
MOST_COMMON = 10  # clothing labels, each with 155 photos or more
TEST_OF_SENDERS = 5  # every fifth sender's photos are the clothing test: nobody's clothes are on both sides
SIZE_PX = 64
LABELS: dict[str, tuple[int | None, ...]] = {"clothing": (100, 1000, None), "grocery": (1000, None)}  # None: all
NUM_DRAWS = 3  # label subsets a linear figure is averaged over
INVERSE_L2 = 0.01

Item = tuple[str, str]  # path below the root, label


@dataclass(frozen=True)
class Split:
    """Packed folders, with labels."""

    train: Path
    test: Path


@dataclass(frozen=True)
class Photos:
    """jpegs: the folder of what is pretrained on. packed: the same as tars. splits: by data set."""

    jpegs: Path
    packed: Path
    splits: dict[str, Split]


def find_data() -> Path:
    """The folder of the two zips, DISTSSL_DATA or ../shared/data. Leaves the program where they are absent."""
    folder = Path(os.environ.get("DISTSSL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    missing = [name for name in (CLOTHING, GROCERY) if not (folder / name).exists()]
    if missing:
        sys.exit(f"{folder}: has no {' and no '.join(missing)}; say DISTSSL_DATA=FOLDER")
    return folder


def prepare(out: Path, num_images: int | None) -> Photos:
    """Unpack and pack what is not there yet. num_images: pretrain on so many only, to try the benchmark out."""
    jpegs, done = out / "jpegs" / "pretrain", out / "jpegs" / "done"
    if not done.exists():
        data = find_data()
        with zipfile.ZipFile(data / CLOTHING) as clothing, zipfile.ZipFile(data / GROCERY) as grocery:
            _unpack(out, clothing, grocery, num_images)
        done.touch()
    splits = {name: Split(_pack(out, f"{name}_train"), _pack(out, f"{name}_test")) for name in LABELS}
    for name, split in splits.items():
        train, test = Dataset.open(split.train), Dataset.open(split.test)
        assert train.classes == test.classes, f"{name}: class numbers differ between train and test"
    return Photos(jpegs, _pack(out, "pretrain"), splits)


def _unpack(out: Path, clothing: zipfile.ZipFile, grocery: zipfile.ZipFile, num_images: int | None) -> None:
    """Write jpegs/ and the CSVs that distssl packs."""
    every, train, test = _clothing_items(clothing)
    seen, unseen = _grocery_items(grocery, "train"), _grocery_items(grocery, "test")
    pretrain = [(name, "") for name, _ in [*every, *seen]]
    if num_images:
        pretrain = sorted(random.Random(0).sample(pretrain, min(num_images, len(pretrain))))
    chosen = {name for name, _ in pretrain}
    for archive, items in ((clothing, every), (grocery, seen), (grocery, unseen)):
        for name, _ in items:
            target = out / _place(name, chosen)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
    tables = {"pretrain": pretrain, "clothing_train": train, "clothing_test": test}
    for title, items in {**tables, "grocery_train": seen, "grocery_test": unseen}.items():
        _write_csv(out / f"{title}.csv", [(_place(name, chosen), label) for name, label in items])


def _place(name: str, chosen: set[str]) -> str:
    return f"jpegs/{'pretrain' if name in chosen else 'rest'}/{name.replace('/', '-', name.count('/') - 1)}"


def _clothing_items(archive: zipfile.ZipFile) -> tuple[list[Item], list[Item], list[Item]]:
    """Every photo; the labelled ones of the training senders; those of the test senders."""
    names = set(archive.namelist())
    with archive.open("images.csv") as file:
        rows = [row for row in csv.DictReader(io.TextIOWrapper(file)) if f"images/{row['image']}.jpg" in names]
    counts = Counter(row["label"] for row in rows)
    labels = [label for label, _ in counts.most_common() if label not in NO_LABEL][:MOST_COMMON]
    items = [(f"images/{row['image']}.jpg", row["label"]) for row in rows]
    test = [int(row["sender_id"]) % TEST_OF_SENDERS == 0 for row in rows]
    labelled = [(item, held) for item, held in zip(items, test, strict=True) if item[1] in labels]
    return items, [item for item, held in labelled if not held], [item for item, held in labelled if held]


def _grocery_items(archive: zipfile.ZipFile, split: str) -> list[Item]:
    lines = archive.read(f"dataset/{split}.txt").decode().splitlines()
    fields = [[field.strip() for field in line.split(",")] for line in lines if line.strip()]
    return [(f"dataset/{name}", fine) for name, fine, _ in fields]


def _write_csv(path: Path, items: Sequence[Item]) -> None:
    with atomic.replacing(path) as part, open(part, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows(items)


def _pack(out: Path, title: str) -> Path:
    folder = out / "packed" / title
    if not (folder / indexing.DATASET).exists():
        print(f"packing {title}", flush=True)
        shards.pack(str(out / f"{title}.csv"), folder)
    return folder


def probe(backbone: Backbone, photos: Photos, context: Context, threads: int, dtype: torch.dtype) -> list[dict]:
    """kNN and linear figures of a backbone on both data sets: rows of data, task, labels (None: all) and value."""
    rows: list[dict] = []
    for name, split in photos.splits.items():
        train = extract(backbone, split.train, context, threads, dtype)
        test = extract(backbone, split.test, context, threads, dtype)
        for neighbours in (1, 20):
            value = classify.knn(train, test, neighbours=neighbours, context=context)["accuracy"]
            rows.append({"data": name, "task": f"{neighbours}-NN", "labels": None, "value": value})
        for num in LABELS[name]:
            subsets = [train] if num is None else [pick(train, num, draw) for draw in range(NUM_DRAWS)]
            found = [classify.linear(subset, test, inverse_l2=INVERSE_L2, context=context) for subset in subsets]
            value = np.mean([metrics["accuracy"] for metrics in found])
            rows.append({"data": name, "task": "linear", "labels": num, "value": float(value)})
    return rows


def extract(backbone: Backbone, packed: Path, context: Context, threads: int, dtype: torch.dtype) -> Features:
    """What the backbone makes of the middle square of every labelled photo."""
    dataset = Dataset.open(packed)
    how = features.Extraction(size_px=SIZE_PX, crop=1.0, threads=threads, max_pixels=50_000_000, dtype=dtype)
    return features.extract(backbone, dataset, dataset.ids_with("label"), how, context)


def pick(train: Features, num: int, draw: int) -> Features:
    """The label subset `draw`, the same images for every backbone."""
    return train.only(labels.subset(train.ids, num, draw))
