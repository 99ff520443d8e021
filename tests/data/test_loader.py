"""The loader: views are the same images whatever the workers, and whatever happens to the bytes."""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import resource
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image, ImageOps

from distssl import method
from distssl.data import augment, graph, shards
from distssl.data.loader import Loader, Request
from distssl.data.order import Order
from distssl.data.quarantine import Entry, Quarantine
from distssl.data.sample import Sample
from distssl.data.shards import Dataset
from distssl.errors import RunError
from distssl.plan import Plan
from tests import planted

NUM = 96
OPTIONS = {"size_px": 24, "solarize": 0.3, "crop_area": (0.2, 1.0)}


@dataclass
class Rank:
    """What a plan asks of a context."""

    rank: int
    world_size: int


def simclr() -> graph.Views:
    found = method.find("simclr")
    return functools.partial(found.views, found.Config.model_validate({"augment": OPTIONS}))


def centre(sample: Sample) -> dict[str, Any]:
    return {"image": augment.centre_crop(sample, 24, 28)}


def make(dataset: Dataset, views: graph.Views, batch_size: int, **options: Any) -> Loader:
    defaults = {"seed": 5, "threads": 1, "max_pixels": 10**6, "quarantine": Quarantine()}
    return Loader(dataset, views, batch_size=batch_size, **{**defaults, **options})


def plan_of(dataset: Dataset, global_batch: int, epochs: int) -> Plan:
    return Plan(Order(dataset.shard_first, seed=5, global_batch=global_batch, lanes=4, shuffle_window=8), epochs, 1)


Batch = dict[str, torch.Tensor]


def batches(
    dataset: Dataset,
    *,
    global_batch: int = 32,
    world_size: int = 1,
    start: int = 0,
    epochs: int = 2,
    views: graph.Views | None = None,
    **options: Any,
) -> tuple[list[Batch], dict[int, Entry]]:
    """The global batches from step `start` on, put together from all ranks', and what the ranks found bad."""
    plan, found, ranks = plan_of(dataset, global_batch, epochs), {}, []
    for rank in range(world_size):
        loader = make(dataset, views or simclr(), global_batch // world_size, **{"quarantine": Quarantine(), **options})
        ranks.append(list(loader.batches(plan.requests(start, cast(Any, Rank(rank, world_size))))))
        found |= {sample: entry for (_, sample), entry in loader.quarantine.entries.items()}
        assert [len(batch["id"]) for batch in ranks[-1]] == [global_batch // world_size] * (plan.total_steps - start)
    joined = [
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in zip(*ranks, strict=True)
    ]
    return joined, found


def by_epoch_and_id(found: list[Batch], steps_per_epoch: int, start: int = 0) -> dict[tuple[int, int], Batch]:
    return {
        ((start + step) // steps_per_epoch, int(sample)): {name: tensor[i] for name, tensor in batch.items()}
        for step, batch in enumerate(found)
        for i, sample in enumerate(batch["id"])
    }


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """JPEG, PNG and WebP of many sizes in tars of different lengths."""
    folder, members = tmp_path_factory.mktemp("photos"), planted.mixed(NUM)
    for shard, part in enumerate((members[:10], members[10:50], members[50:])):
        planted.write_tar(folder / f"{shard}.tar", part)
    return Dataset.open(shards.index(str(folder)))


@pytest.fixture(scope="module")
def reference(photos: Dataset) -> dict[tuple[int, int], Batch]:
    """Every sample's views in two epochs, made by one worker with batches of 32."""
    found = by_epoch_and_id(batches(photos)[0], NUM // 32)
    assert len(found) == 2 * NUM
    return found


@pytest.mark.parametrize(
    ("global_batch", "world_size", "threads", "prefetch"),
    [(32, 2, 2, 2), (32, 4, 1, 1), (8, 1, 2, 3), (8, 2, 1, 2), (8, 4, 2, 2)],
)
def test_views_are_the_same_images_whatever_the_workers(
    photos: Dataset, reference: dict, global_batch: int, world_size: int, threads: int, prefetch: int
) -> None:
    found, bad = batches(photos, global_batch=global_batch, world_size=world_size, threads=threads, prefetch=prefetch)
    assert not bad
    views = by_epoch_and_id(found, NUM // global_batch)
    assert views.keys() == reference.keys()
    for key in views:
        assert equal(views[key], reference[key]), key


@pytest.mark.parametrize(("start", "world_size"), [(2, 1), (4, 2), (5, 4)])
def test_views_after_a_resume_are_those_of_a_run_that_never_stopped(
    photos: Dataset, reference: dict, start: int, world_size: int
) -> None:
    views = by_epoch_and_id(batches(photos, start=start, world_size=world_size)[0], NUM // 32, start)
    assert len(views) == 2 * NUM - start * 32
    for key in views:
        assert equal(views[key], reference[key]), key


def test_views_differ_between_epochs_views_and_seeds(photos: Dataset, reference: dict) -> None:
    other = by_epoch_and_id(batches(photos, epochs=1, seed=6)[0], NUM // 32)
    for sample in range(NUM):
        here = reference[0, sample]
        for there in (reference[1, sample], other[0, sample], {"a": here["b"]}):
            assert not torch.equal(here["a"], there["a"])


def put(dataset: Dataset, sample: int, data: bytes) -> int:
    planted.overwrite(dataset, sample, data)
    return sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four tars of 16 good PNGs each, indexed."""
    for shard in range(4):
        members = [(f"s{shard}k{i}.png", planted.picture(100 * shard + i)) for i in range(16)]
        planted.write_tar(tmp_path / "t" / f"{shard}.tar", members)
    return shards.index(str(tmp_path / "t"))


def spoil(dataset: Dataset) -> dict[int, str]:
    """Bad bytes of every kind where good ones were indexed; {id: pattern of the reason}."""
    reasons = {}
    for nth, kind in enumerate(("zeros", "garbage", "html", "gif", "avif", "cut_jpeg", "cut_png", "bomb")):
        sample = 3 + 5 * nth  # in three of the tars
        data, reason = planted.bad(int(dataset.rows(np.array([sample])).size[0]))[kind]
        reasons[put(dataset, sample, data)] = reason
    return reasons


@pytest.mark.parametrize("prefetch", [1, 2])
def test_bad_bytes_are_named_once_and_replaced_alike_by_any_number_of_workers(
    folder: Path, prefetch: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = Dataset.open(folder)
    reasons = spoil(dataset)
    with caplog.at_level(logging.WARNING, "distssl"):
        alone, bad = batches(dataset, global_batch=16, prefetch=prefetch)
    assert bad.keys() == reasons.keys()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(reasons)
    rows = dataset.rows(np.array(sorted(reasons)))
    for i, sample in enumerate(sorted(reasons)):
        entry = bad[sample]
        assert (entry["shard"], entry["key"]) == (f"{rows.shard[i]}.tar", f"s{sample // 16}k{sample % 16}")
        assert entry["offset"] == rows.offset[i]
        assert re.search(reasons[sample], entry["reason"]), entry
        assert f"bad sample {entry['shard']} at {entry['offset']}, {entry['key']}: {entry['reason']}" in lines

    plan = plan_of(dataset, 16, 2)
    for step, batch in enumerate(alone):
        wanted, got = plan.order.batch(*divmod(step, plan.steps_per_epoch)), batch["id"].numpy()
        replaced = wanted != got
        assert np.array_equal(replaced, np.isin(wanted, list(reasons)))
        for slot in np.flatnonzero(replaced):
            tries = [plan.order.replacement(*divmod(step, plan.steps_per_epoch), int(slot), n) for n in range(64)]
            assert got[slot] == next(sample for sample in tries if sample not in reasons)
    for world_size in (2, 4):
        together, found = batches(dataset, global_batch=16, world_size=world_size, prefetch=prefetch)
        assert found == bad
        assert all(equal(a, b) for a, b in zip(alone, together, strict=True))
    known = Quarantine()
    known.merge(list(bad.values()))  # as after a resume
    resumed, found = batches(dataset, global_batch=16, start=3, quarantine=known)
    assert all(equal(a, b) for a, b in zip(alone[3:], resumed, strict=True))


def test_a_bad_sample_in_two_batches_in_flight_is_the_data_both_times(folder: Path) -> None:
    dataset = Dataset.open(folder)
    size = int(dataset.rows(np.array([5])).size[0])
    put(dataset, 5, planted.bad(size)["cut_png"][0])
    ids = np.arange(8)
    requests = [Request(ids, epoch, lambda index, attempt: 20 + index) for epoch in range(6)]
    found = list(make(dataset, simclr(), 8, prefetch=3).batches(iter(requests)))
    assert [batch["id"].tolist() for batch in found] == [[0, 1, 2, 3, 4, 25, 6, 7]] * 6


def test_without_a_replacement_bad_samples_are_left_out(folder: Path) -> None:
    dataset = Dataset.open(folder)
    reasons = spoil(dataset)
    ids = np.arange(64)
    requests = [Request(part) for part in (*np.split(ids, 8), np.array(sorted(reasons)))]
    found = list(make(dataset, centre, 8).batches(iter(requests)))
    assert [int(i) for batch in found for i in batch["id"]] == [i for i in range(64) if i not in reasons]
    assert all(batch["image"].is_contiguous(memory_format=torch.channels_last) for batch in found)


def test_flipped_bytes_give_the_same_views_whatever_the_workers(tmp_path: Path) -> None:
    members = [(f"{i}.jpg", planted.flipped(planted.picture(i, "JPEG", (300, 200)))) for i in range(16)]
    members += [(f"good{i}.jpg", planted.picture(i, "JPEG")) for i in range(16)]
    planted.write_tar(tmp_path / "t" / "a.tar", members)
    dataset = Dataset.open(shards.index(str(tmp_path / "t")))
    alone, bad = batches(dataset, global_batch=16)
    together, found = batches(dataset, global_batch=16, world_size=4, threads=2)
    assert found == bad
    assert all(equal(a, b) for a, b in zip(alone, together, strict=True))


def cut(tar: Path) -> str:
    os.truncate(tar, 40_000)
    return "bytes at .* where the index says"


def delete(tar: Path) -> str:
    tar.unlink()
    return "No such file"


def test_a_tar_that_cannot_be_read_is_an_error_where_only_what_lasts_may_be_left_out(folder: Path) -> None:
    dataset = Dataset.open(folder)
    cut(folder / "2.tar")
    requests = [Request(part) for part in np.split(np.arange(64), 8)]
    found = list(make(dataset, centre, 8, quarantine=Quarantine(lasting=True)).batches(iter(requests)))
    there = {int(i) for batch in found for i in batch["id"]}
    assert set(range(dataset.shard_first[2])) <= there < set(range(64))
    delete(folder / "1.tar")
    with pytest.raises(RunError, match=r"1\.tar: cannot be read: .*No such file"):
        list(make(dataset, centre, 8, quarantine=Quarantine(lasting=True)).batches(iter(requests)))


@pytest.mark.parametrize("damage", [cut, delete])
def test_a_tar_that_is_cut_or_deleted_after_indexing_costs_only_its_samples(folder: Path, damage: Any) -> None:
    dataset = Dataset.open(folder)
    reason = damage(folder / "2.tar")
    alone, bad = batches(dataset, global_batch=16, epochs=1)
    assert bad
    assert {entry["shard"] for entry in bad.values()} == {"2.tar"}
    assert all(re.search(reason, entry["reason"]) for entry in bad.values())
    together, found = batches(dataset, global_batch=16, epochs=1, world_size=2)
    assert found == bad
    assert all(equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_lane_without_a_usable_sample_ends_the_run(folder: Path) -> None:
    for tar in folder.glob("*.tar"):
        tar.unlink()
    with pytest.raises(RunError, match="no usable sample in 64 tries"):
        batches(Dataset.open(folder), global_batch=16)


def test_a_failure_that_is_not_the_datas_is_not_swallowed(folder: Path) -> None:
    def views(sample: Sample) -> dict[str, Any]:
        return {"image": sample.encoded}  # of different lengths: no tensor

    with pytest.raises(RuntimeError, match=r"as_tensor|dense|shape"):
        batches(Dataset.open(folder), global_batch=16, views=views)


def test_bad_files_in_tars_before_indexing_never_reach_the_loader(tmp_path: Path) -> None:
    bad = {kind: data for kind, (data, _) in planted.bad(3000).items()} | {"empty": b""}
    members = [(f"good{i}.png", planted.picture(i)) for i in range(24)]
    members[5:5] = [(f"{kind}.jpg", data) for kind, data in bad.items()]
    planted.write_tar(tmp_path / "t" / "a.tar", members)
    seen_by_header = set(bad) - {"cut_jpeg", "cut_png"}
    dataset = Dataset.open(shards.index(str(tmp_path / "t")))
    assert dataset.num_samples == 24 + len(bad) - len(seen_by_header)
    _, found = batches(dataset, global_batch=8)
    assert {entry["key"] for entry in found.values()} == {"cut_jpeg", "cut_png"}


def test_an_image_of_a_billion_pixels_is_never_decoded(folder: Path) -> None:
    dataset = Dataset.open(folder)
    for sample in (1, 17, 33):
        size = int(dataset.rows(np.array([sample])).size[0])
        put(dataset, sample, planted.bad(size)["bomb"][0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, bad = batches(dataset, global_batch=16, epochs=1)
    assert bad.keys() == {1, 17, 33}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB; decoding takes gigabytes


def test_files_are_closed_at_the_end(photos: Dataset) -> None:
    def num_open() -> int:
        return sum(path.resolve().suffix == ".tar" for path in Path("/proc/self/fd").iterdir())

    before = num_open()
    loader = make(photos, centre, 8)
    running = loader.batches(iter([Request(np.arange(8)), Request(np.arange(50, 58))] * 4))
    next(running)
    assert num_open() > before
    running.close()
    assert num_open() == before


def one_by_one(dataset: Dataset) -> Iterator[tuple[str, torch.Tensor]]:
    requests = (Request(np.array([i])) for i in range(dataset.num_samples))
    for batch in make(dataset, centre, 1).batches(requests):
        yield dataset.keys(batch["id"].numpy())[0], batch["image"][0]


def check_pixels(dataset: Dataset, files: dict[str, bytes]) -> None:
    """Every sample's centre crop is that of the PNG of what PIL decodes."""
    seen = dict(one_by_one(dataset))
    assert seen.keys() == files.keys()
    for key, data in files.items():
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        scale = 28 / min(image.size)
        small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (small.width - 24) / 2, (small.height - 24) / 2
        expected = np.asarray(small.crop((round(left), round(top), round(left) + 24, round(top) + 24)))
        got = seen[key].permute(1, 2, 0).numpy().astype(int)
        shifted = [
            np.abs(np.roll(got, move, (0, 1))[1:-1, 1:-1] - expected[1:-1, 1:-1]).mean()
            for move in ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
        ]  # half a pixel rounds either way
        assert min(shifted) < 3, key


def test_tars_written_by_webdataset_load(tmp_path: Path) -> None:
    files = {f"d/{i:03d}": planted.picture(i, "JPEG", quality=95) for i in range(6)}
    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for i, (key, data) in enumerate(files.items()):
            writer.write({"__key__": key, "jpg": data, "cls": str(i).encode(), "json": b"{}"})
    dataset = Dataset.open(shards.index(str(tmp_path)))
    check_pixels(dataset, files)
    assert dataset.rows(np.arange(6)).label.tolist() == list(range(6))


@pytest.mark.parametrize("style", ["pax", "gnu"])
def test_tars_of_the_tar_command_with_foreign_names_load(style: str, tmp_path: Path) -> None:
    names = ["ein Bild äöü.jpg", "日本/写真.png", "x" * 40 + "/" + "y" * 180 + ".webp"]
    files = {}
    for i, name in enumerate(names):
        path = tmp_path / "s" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[name.rpartition(".")[2]]
        path.write_bytes(planted.picture(i, kind, **({} if kind == "PNG" else {"quality": 95})))
        files["./" + name.rpartition(".")[0]] = path.read_bytes()
    subprocess.run(["tar", f"--format={style}", "-cf", tmp_path / "a.tar", "-C", tmp_path / "s", "."], check=True)
    assert tarfile.is_tarfile(tmp_path / "a.tar")
    check_pixels(Dataset.open(shards.index(str(tmp_path / "a.tar"), tmp_path / "i")), files)
