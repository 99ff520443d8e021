"""Sets of permutations: known optima, what the greedy choice guarantees, and the file they are kept in."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import numpy as np
import pytest

from distssl.errors import ConfigError
from distssl.nn import permutations


def distances(chosen: np.ndarray) -> np.ndarray:
    """Hamming distances of all pairs."""
    return np.array(
        [(rest != row).sum(1).min() for row, rest in ((r, chosen[i:]) for i, r in enumerate(chosen, 1)) if len(rest)]
    )


def guaranteed(num: int, items: int) -> int:
    """The largest d that greedy choice reaches whatever it meets: balls of d - 1 leave room (Gilbert, Varshamov)."""
    moved = [1, 0]  # derangements of r items
    for r in range(2, items + 1):
        moved.append((r - 1) * (moved[-1] + moved[-2]))
    balls = np.cumsum([math.comb(items, r) * moved[r] for r in range(items + 1)])  # within r of one
    return max(d for d in range(1, items + 1) if d == 1 or (num - 1) * balls[d - 1] < math.factorial(items))


def greedy(num: int, items: int) -> list[tuple[int, ...]]:
    """The definition, word by word."""
    everything = list(itertools.permutations(range(items)))
    chosen = [everything[0]]
    while len(chosen) < num:
        far = [[sum(a != b for a, b in zip(p, q, strict=True)) for q in chosen] for p in everything]
        chosen.append(everything[max(range(len(everything)), key=lambda i: (min(far[i]), sum(far[i]), -i))])
    return chosen


@pytest.mark.parametrize(("num", "items"), [(1, 1), (2, 2), (6, 3), (4, 4), (24, 4), (40, 5)])
def test_the_choice_is_the_greedy_one(num: int, items: int) -> None:
    assert [tuple(row) for row in permutations.choose(num, items).tolist()] == greedy(num, items)


@pytest.mark.parametrize(("num", "items"), [(2, 9), (5, 9), (9, 9), (4, 4), (3, 4), (8, 8)])
def test_up_to_as_many_permutations_as_tiles_are_a_latin_rectangle(num: int, items: int) -> None:
    chosen = permutations.choose(num, items)
    assert distances(chosen).min() == items
    assert all(len(set(column)) == num for column in chosen.T.tolist())


@pytest.mark.parametrize(("num", "found"), [(100, 6), (701, 5), (1000, 5), (2000, 4)])
def test_large_sets_keep_the_distance_that_is_documented_and_more_than_is_guaranteed(num: int, found: int) -> None:
    start = time.process_time()
    chosen = permutations.choose(num, 9)
    assert time.process_time() - start < 20  # measured: 2 s for 2000
    assert np.array_equal(np.sort(chosen, axis=1), np.tile(np.arange(9), (num, 1)))
    assert len(np.unique(chosen, axis=0)) == num
    assert distances(chosen).min() == found >= guaranteed(num, 9)


def test_a_smaller_set_is_the_beginning_of_a_larger_one() -> None:
    assert np.array_equal(permutations.choose(12, 6), permutations.choose(50, 6)[:12])


def test_all_permutations_can_be_asked_for_and_not_one_more(tmp_path: Path) -> None:
    assert len(np.unique(permutations.far_apart(24, 4, tmp_path), axis=0)) == 24
    with pytest.raises(ConfigError, match=r"permutations=25: 4 tiles have 24"):
        permutations.far_apart(25, 4, tmp_path)
    with pytest.raises(ConfigError, match="16 tiles"):
        permutations.far_apart(10, 16, tmp_path)


def test_a_kept_set_is_read_and_a_damaged_one_chosen_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    permutations.far_apart.cache_clear()
    first = permutations.far_apart(10, 5, tmp_path)
    [path] = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], bytes(len(whole))):
        path.write_bytes(damaged)
        permutations.far_apart.cache_clear()
        assert np.array_equal(permutations.far_apart(10, 5, tmp_path), first)
        assert path.read_bytes() == whole
    assert caplog.text.count("damaged") == 4

    monkeypatch.setattr(permutations, "choose", lambda num, items: pytest.fail("chosen again"))
    assert permutations.far_apart(10, 5, tmp_path) is permutations.far_apart(10, 5, tmp_path)
    permutations.far_apart.cache_clear()
    assert np.array_equal(permutations.far_apart(10, 5, tmp_path), first)
    permutations.far_apart.cache_clear()


def test_where_nothing_can_be_written_the_set_is_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert np.array_equal(permutations.far_apart(7, 5, blocked / "cache"), permutations.choose(7, 5))
    assert "cannot be kept" in caplog.text
