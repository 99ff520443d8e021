"""The store reads what the index points at and says what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from distssl.data import store


def num_open(paths: list[Path]) -> int:
    """Of this process."""
    shards = set(map(str, paths))
    return sum(os.path.realpath(file) in shards for file in Path("/proc/self/fd").iterdir())


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"{i}.tar" for i in range(store.MOST_OPEN + 40)]
    for i, path in enumerate(made):
        path.write_bytes(b"%06d" % i * 3)
    return made


def test_bytes_come_from_their_shard_and_offset_with_few_files_open(paths: list[Path]) -> None:
    reader = store.LocalStore(paths)
    for _ in range(2):
        for shard in range(len(paths)):
            assert reader.read(shard, 6, 6) == b"%06d" % shard
            assert 0 < num_open(paths) <= store.MOST_OPEN
    reader.close()
    assert num_open(paths) == 0
    assert reader.read(3, 0, 2) == b"00"  # and it opens again
    reader.close()


def test_a_shard_that_is_cut_or_gone_is_named(paths: list[Path]) -> None:
    reader = store.LocalStore(paths)
    with pytest.raises(store.TornShardError, match="8 bytes at 10 where the index says 100"):
        reader.read(0, 10, 100)
    with pytest.raises(store.TornShardError, match="0 bytes at 999"):
        reader.read(0, 999, 1)
    paths[1].unlink()
    with pytest.raises(FileNotFoundError):
        reader.read(1, 0, 1)
    reader.close()
