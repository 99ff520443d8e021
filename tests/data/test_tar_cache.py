"""The cache of a node: never above its bound, nothing evicted that is in use, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distssl.data.tar_cache import Denied, TarCache
from distssl.data.transfer import Tar

TARS = [Tar(f"http://h/{i}.tar", 1000, None, "t") for i in range(5)]


@pytest.fixture
def cache(tmp_path: Path) -> TarCache:
    return TarCache(tmp_path / "tars", 3500)


def bring(cache: TarCache, tar: Tar) -> int:
    """Downloads it, so to speak: what pins it."""
    claim = cache.claim(tar)
    assert isinstance(claim, int)
    os.pwrite(claim, bytes(tar.num_bytes), 0)
    cache.finish(tar, claim)
    return claim


def there(cache: TarCache) -> list[int]:
    return [nth for nth, tar in enumerate(TARS) if (cache.folder / f"{tar.name}.tar").exists()]


def test_the_least_recently_used_goes_first(cache: TarCache) -> None:
    for tar in TARS[:3]:
        os.close(bring(cache, tar))
    pin = cache.pin(TARS[0])
    assert pin is not None
    os.close(pin)
    os.close(bring(cache, TARS[3]))
    assert there(cache) == [0, 2, 3]
    assert cache.touch(TARS[2])
    assert not cache.touch(TARS[1])
    os.close(bring(cache, TARS[4]))
    assert there(cache) == [2, 3, 4]


def test_what_is_pinned_stays_and_a_claim_that_has_no_room_changes_nothing(cache: TarCache) -> None:
    pins = [bring(cache, tar) for tar in TARS[:2]]
    os.close(bring(cache, TARS[2]))
    two = Tar("http://h/two.tar", 2000, None, None)
    assert cache.claim(two) is Denied.FULL
    assert there(cache) == [0, 1, 2]
    assert not list(cache.folder.glob("*.part"))
    os.close(pins[0])
    assert isinstance(cache.claim(two), int)
    assert there(cache) == [1]


def test_names_to_keep_are_not_evicted_for_a_claim(cache: TarCache) -> None:
    for tar in TARS[:3]:
        os.close(bring(cache, tar))
    assert cache.claim(TARS[3], [tar.name for tar in TARS[:3]]) is Denied.FULL
    assert isinstance(cache.claim(TARS[3], [TARS[0].name]), int)
    assert there(cache) == [0, 2]


def test_a_part_counts_as_the_whole_tar_and_is_one_processs_alone(cache: TarCache) -> None:
    claims = [cache.claim(tar) for tar in TARS[:3]]
    assert all(isinstance(claim, int) for claim in claims)
    assert cache.claim(TARS[0]) is Denied.BUSY
    assert cache.claim(TARS[3]) is Denied.FULL
    assert isinstance(claims[0], int)
    cache.give_up(TARS[0], claims[0], keep=False)
    assert isinstance(cache.claim(TARS[3]), int)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.data.test_tar_cache import TARS, TarCache
claim = TarCache(Path(sys.argv[1]), 3500).claim(TARS[0])
os.pwrite(claim, b"half" * 100, 0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_gone_on_with_or_evicted(cache: TarCache) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(cache.folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    claim = cache.claim(TARS[0])
    assert isinstance(claim, int)
    assert os.pread(claim, 9999, 0) == b"half" * 100
    cache.give_up(TARS[0], claim, keep=True)
    for tar in TARS[1:4]:
        os.close(bring(cache, tar))
    assert not list(cache.folder.glob("*.part"))


def test_a_smaller_bound_holds_from_the_start(cache: TarCache) -> None:
    for tar in TARS[:3]:
        os.close(bring(cache, tar))
    assert there(TarCache(cache.folder, 1000)) == [2]


def test_an_evicted_tar_is_not_pinned(cache: TarCache) -> None:
    os.close(bring(cache, TARS[0]))
    assert cache.evict_one()
    assert cache.pin(TARS[0]) is None
    assert not cache.evict_one()
