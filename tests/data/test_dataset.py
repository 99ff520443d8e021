"""Dataset: rows by id, in any order, in bounded memory; a damaged index is told in one line."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distssl.data import annotations, indexing, shards
from distssl.data.dataset import NUMBERS, Dataset
from distssl.errors import ConfigError


def write_index(folder: Path, sizes: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    """An index with random rows, written as `index` writes it, without tars."""
    rng, n = np.random.default_rng(seed), sum(sizes)
    shard = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    columns: dict[str, np.ndarray] = {
        "shard": shard,
        "offset": rng.integers(0, 2**40, n),
        "size": rng.integers(1, 2**31, n),
        **{names[0]: rng.integers(0, 2**40, n) for names in indexing.PLACES.values()},
        **{names[1]: rng.integers(0, 2**31, n) for names in indexing.PLACES.values()},
    }
    columns |= {name: rng.integers(-1, 2**14, n, dtype=np.int32) for name in ("height", "width", "label")}
    folder.mkdir(exist_ok=True)
    meta = {indexing.META: json.dumps({"version": indexing.VERSION, "fingerprint": "f"}).encode()}
    schema = indexing.INDEX_SCHEMA.with_metadata(meta)
    with pq.ParquetWriter(folder / indexing.INDEX, schema) as writer:
        first = 0
        for size in sizes:
            part = {name: column[first : first + size] for name, column in columns.items()}
            keys = pa.array(np.arange(first, first + size)).cast(pa.string())
            arrays = [keys if name == "key" else pa.array(part[name]) for name in schema.names]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=size)
            first += size
    described = {
        "version": indexing.VERSION,
        "fingerprint": "f",
        "samples": n,
        "labelled": int((columns["label"] >= 0).sum()),
        "annotated": dict.fromkeys(annotations.KINDS, n),
        "classes": ["a", "b"],
        "shards": [{"path": f"{i}.tar", "bytes": 1, "sha256": "0", "samples": size} for i, size in enumerate(sizes)],
    }
    (folder / indexing.DATASET).write_text(json.dumps(described))
    return columns


def test_rows_are_those_of_a_full_read_for_any_ids(tmp_path):
    columns = write_index(tmp_path, [7, 1, 30, 12])
    dataset = shards.Dataset.open(tmp_path)
    np.testing.assert_array_equal(dataset.shard_first, [0, 7, 8, 38, 50])
    rng = np.random.default_rng(1)
    for ids in (np.arange(50), rng.permutation(50), rng.integers(0, 50, 200), np.array([49]), np.array([], np.int64)):
        rows = dataset.rows(ids, annotations.KINDS)
        for kind, (offset, size) in indexing.PLACES.items():
            np.testing.assert_array_equal(rows.annotation_offset[kind], columns[offset][ids])
            np.testing.assert_array_equal(rows.annotation_size[kind], columns[size][ids])
        for name in ("shard", *NUMBERS):
            np.testing.assert_array_equal(getattr(rows, name), columns[name][ids])
        assert dataset.keys(ids) == [str(i) for i in ids]
    assert rows.offset.dtype == rows.size.dtype == rows.shard.dtype == np.int64
    assert rows.label.dtype == rows.height.dtype == np.int32
    assert dataset.num_samples == 50
    assert dataset.classes == ("a", "b")


@pytest.mark.parametrize("ids", [[-1], [50], [0, 50]])
def test_an_id_that_is_not_there_is_an_index_error(ids, tmp_path):
    write_index(tmp_path, [50])
    with pytest.raises(IndexError, match="of a data set of 50 samples"):
        shards.Dataset.open(tmp_path).rows(np.array(ids))


def test_a_million_rows_are_read_in_bounded_memory(tmp_path):
    sizes = [5_000] * 200
    columns = write_index(tmp_path, sizes)
    row_bytes = 28
    limit = 20 * 5_000 * row_bytes
    tracemalloc.start()
    arrow = pa.total_allocated_bytes()
    dataset = Dataset.open(tmp_path, cache_bytes=limit)
    rng, peak = np.random.default_rng(0), 0
    for _ in range(3):
        ids = rng.integers(0, 10**6, 1000)
        rows = dataset.rows(ids)
        for name in NUMBERS:
            np.testing.assert_array_equal(getattr(rows, name), columns[name][ids])
        peak = max(peak, pa.total_allocated_bytes() - arrow)
    _, python_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak + python_peak < limit + 5 * 2**20  # all rows are 28 MB
    assert dataset._cached_bytes <= limit


def test_a_batch_inside_the_cache_reads_each_row_group_once(tmp_path, monkeypatch):
    write_index(tmp_path, [100] * 20)
    dataset = shards.Dataset.open(tmp_path)
    reads, read = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, i, **o: (reads.append(i), read(self, i, **o))[1])
    for seed in range(5):
        dataset.rows(np.random.default_rng(seed).integers(0, 2000, 500))
    assert sorted(reads) == list(range(20))


def test_a_missing_index_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"no dataset\.json here"):
        shards.Dataset.open(tmp_path)
    write_index(tmp_path, [5])
    (tmp_path / indexing.INDEX).unlink()
    with pytest.raises(ConfigError, match=r"no index\.parquet here"):
        shards.Dataset.open(tmp_path)


@pytest.mark.parametrize("damage", ["json", "version", "field", "parquet", "cut", "count", "shards", "other"])
def test_a_damaged_index_is_told(damage, tmp_path):
    write_index(tmp_path, [5, 6])
    description, rows = tmp_path / indexing.DATASET, tmp_path / indexing.INDEX
    described = json.loads(description.read_text())
    if damage == "parquet":
        rows.write_bytes(b"garbage")
    elif damage == "cut":
        rows.write_bytes(rows.read_bytes()[:-20])
    elif damage == "json":
        description.write_text(description.read_text()[:-20])
    else:
        changes = {
            "version": {"version": 99},
            "field": {"shards": [{}]},
            "count": {"samples": 12},
            "shards": {"shards": described["shards"][:1], "samples": 5},
            "other": {"fingerprint": "g"},
        }
        description.write_text(json.dumps(described | changes[damage]))
    with pytest.raises(ConfigError, match=str(tmp_path)) as caught:
        shards.Dataset.open(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_later_columns_do_not_disturb(tmp_path):
    columns = write_index(tmp_path, [8])
    table = pq.read_table(tmp_path / indexing.INDEX)
    wider = table.append_column("caption_offset", pa.array([1] * 8, pa.int64()))
    pq.write_table(wider, tmp_path / indexing.INDEX)
    np.testing.assert_array_equal(shards.Dataset.open(tmp_path).rows(np.arange(8)).offset, columns["offset"])


def test_rows_can_be_sent_to_another_process(tmp_path):
    write_index(tmp_path, [8])
    rows = pickle.loads(pickle.dumps(shards.Dataset.open(tmp_path).rows(np.arange(8))))
    assert len(rows.offset) == 8
