"""Brings remote tars into the node's cache: threads ahead of use, and whoever cannot wait."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Sequence

from distssl import atomic, stores
from distssl.config import Machine
from distssl.data import transfer
from distssl.data.tar_cache import Denied, TarCache
from distssl.data.transfer import Tar
from distssl.errors import ConfigError, RunError

GB = 10**9
MOST_EXPECTED = 256  # tars fetched ahead
POLL_S = 0.05  # where another process has what is waited for
TOUCH_S = 1.0  # between two looks at all that is expected


class Traffic:
    """What the stores of one dataset in this process have done. hits: tars of a request that were there at once."""

    def __init__(self) -> None:
        self.hits = 0
        self.misses = 0
        self.num_downloads = 0
        self.num_bytes = 0
        self._told = 0, 0
        self._lock = threading.Lock()

    def add(self, *, hits: int = 0, misses: int = 0, num_downloads: int = 0, num_bytes: int = 0) -> None:
        with self._lock:
            self.hits += hits
            self.misses += misses
            self.num_downloads += num_downloads
            self.num_bytes += num_bytes

    def take_hit_rate(self) -> float:
        """Hits over hits and misses since the last call; 1 where there were none."""
        hits, misses = self.hits - self._told[0], self.misses - self._told[1]
        self._told = self.hits, self.misses
        return hits / (hits + misses) if hits + misses else 1.0


class Fetcher:
    """The tars of one dataset, for one reading thread, of one of `num_sharing` processes of a node."""

    def __init__(self, tars: Sequence[Tar], machine: Machine, traffic: Traffic, num_sharing: int) -> None:
        self.tars = tars
        self.machine = machine
        self.traffic = traffic
        self.num_sharing = num_sharing
        self.cache = TarCache(machine.cache / "tars", int(machine.cache_gb * GB))
        self._changed = threading.Condition()  # guards all below
        self._stop: threading.Event | None = None  # of the threads that run; None: there are none
        self._expected: list[int] = []  # shards in the order of first use
        self._there: set[int] = set()  # of them in the cache, when we last looked
        self._fetching: set[int] = set()
        self._later: dict[int, float] = {}  # not to be tried before this time
        self._demanded: int | None = None  # what the reader waits for another thread to bring
        self._handed: int | None = None  # the same, pinned
        self._error: Exception | None = None
        self._looked = 0.0

    def expect(self, shards: Sequence[int]) -> None:
        """Shards that will be read, in this order: as many as fit this process's part of the cache are fetched.

        Raises what has gone wrong with one since the last call.
        """
        budget = self.cache.num_bytes / self.num_sharing
        chosen: list[int] = []
        for shard in shards:
            budget -= self.tars[shard].num_bytes
            if (budget < 0 and chosen) or len(chosen) == MOST_EXPECTED:
                break
            chosen.append(shard)
        with self._changed:
            self._raise_error()
            known, now = set(self._expected), time.monotonic()
            again = now - self._looked > TOUCH_S
            self._looked = now if again else self._looked
        # What is expected counts as used, so that other processes evict what is not.
        looked_at = [shard for shard in chosen if again or shard not in known]
        there = {shard for shard in looked_at if self.cache.touch(self.tars[shard])}
        with self._changed:
            self._expected = chosen
            self._there = self._there.intersection(chosen).difference(looked_at) | there
            self._start()
            self._changed.notify_all()

    def pinned(self, shard: int) -> int | None:
        """A file descriptor that pins a shard until it is closed; None where it is not here."""
        descriptor = self.cache.pin(self.tars[shard])
        self.traffic.add(hits=descriptor is not None, misses=descriptor is None)
        return descriptor

    def bring(self, shard: int) -> int:
        """The same, waiting for it; fetched by this thread where no other is at it.

        Raises RunError or ConfigError where the store or the disk does not give or take it.
        """
        deadline = time.monotonic() + self.machine.retry_s
        descriptor = None
        while descriptor is None:
            if self._await_turn(shard):
                descriptor, self._handed = self._handed, None
                continue
            try:
                descriptor = self._fetch(shard, (), None, deadline)
            finally:
                self._let_go(shard)
            if descriptor is None:
                descriptor = self.cache.pin(self.tars[shard])
                time.sleep(0 if descriptor is not None else POLL_S)
        return descriptor

    def close(self) -> None:
        """End the threads, each when it next looks; a later `expect` starts new ones."""
        with self._changed:
            if self._stop:
                self._stop.set()
            if self._handed is not None:
                os.close(self._handed)
            self._stop, self._handed, self._error = None, None, None
            self._expected, self._later = [], {}
            self._changed.notify_all()

    def _await_turn(self, shard: int) -> bool:
        """Until no other thread fetches this shard; whether one has, and handed it over."""
        with self._changed:
            self._demanded = shard
            self._changed.wait_for(lambda: self._error or self._handed is not None or shard not in self._fetching)
            self._demanded = None
            self._raise_error()
            if self._handed is None:
                self._fetching.add(shard)
            return self._handed is not None

    def _let_go(self, shard: int) -> None:
        with self._changed:
            self._fetching.discard(shard)
            self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _start(self) -> None:
        if self._stop is None:
            self._stop = threading.Event()
            for _ in range(self.machine.download_threads):
                threading.Thread(target=self._work, args=(self._stop,), name="download", daemon=True).start()

    def _work(self, stop: threading.Event) -> None:
        """One thread: fetch the shard that is expected first and not here yet, again and again."""
        while (shard := self._next(stop)) is not None:
            try:
                with self._changed:
                    keep = [self.tars[each].name for each in self._expected]
                descriptor = self._fetch(shard, keep, stop, None)
                if descriptor is not None:
                    self._hand_over(shard, descriptor)
            except stores.StoppedError:
                pass
            except Exception as error:  # noqa: BLE001 - raised again where the shards are read
                with self._changed:
                    self._error = self._error or error
                    self._later[shard] = math.inf
            finally:
                self._let_go(shard)

    def _next(self, stop: threading.Event) -> int | None:
        """A shard to fetch, as soon as there is one; None to stop."""
        with self._changed:
            while not stop.is_set():
                missing = [each for each in self._expected if each not in self._there and each not in self._fetching]
                now = time.monotonic()
                for shard in missing:
                    if self._later.get(shard, 0.0) <= now:
                        self._fetching.add(shard)
                        return shard
                self._changed.wait(POLL_S if missing else None)
        return None

    def _hand_over(self, shard: int, descriptor: int) -> None:
        """A tar that the reader waits for stays pinned for it."""
        with self._changed:
            self._there.add(shard)
            if self._demanded == shard and self._handed is None:
                self._handed = descriptor
            else:
                os.close(descriptor)

    def _fetch(
        self, shard: int, keep: Sequence[str], stop: threading.Event | None, deadline: float | None
    ) -> int | None:
        """Bring a shard here: what pins it, or None where that is not to be done now.

        deadline: the time to give up waiting for room. Raises RunError, ConfigError and StoppedError.
        """
        tar = self.tars[shard]
        try:
            claim = self.cache.claim(tar, keep)
            if isinstance(claim, int):
                self._bring(tar, claim, stop)
                return claim
        except OSError as error:
            raise self._named(error) from error
        with self._changed:
            self._later[shard] = time.monotonic() + POLL_S
            if claim is Denied.THERE:
                self._there.add(shard)
        if claim is Denied.FULL and deadline is not None and time.monotonic() > deadline:
            raise RunError(
                f"machine.cache_gb={self.machine.cache_gb:g}: no room in {self.cache.folder} for {tar.url} "
                f"({gigabytes(tar.num_bytes)} GB): other processes use all of it; a larger one is right"
            )
        return None

    def _bring(self, tar: Tar, descriptor: int, stop: threading.Event | None) -> None:
        """Download into a claimed part and finish it, or give it up."""
        whole, resumable = False, False
        try:
            num_bytes = transfer.download(
                tar, descriptor, retry_s=self.machine.retry_s, stop=stop, on_full=self.cache.evict_one
            )
            self.cache.finish(tar, descriptor)
            whole = True
        except (stores.StoppedError, RunError) as error:
            resumable = not isinstance(error, transfer.TornError)
            raise
        finally:
            if not whole:
                self.cache.give_up(tar, descriptor, keep=resumable)
        self.traffic.add(num_downloads=1, num_bytes=num_bytes)

    def _named(self, error: OSError) -> ConfigError:
        if atomic.is_full_disk(error):
            free = gigabytes(shutil.disk_usage(self.cache.folder).free)
            return ConfigError(
                f"machine.cache={self.machine.cache}: the disk is full, {free} GB free, and nothing of the cache can "
                f"go; free some space or set machine.cache_gb, {self.machine.cache_gb:g} now, to what the disk has"
            )
        return ConfigError(f"machine.cache={self.machine.cache}: {error}; a folder that can be written is right")


def require_room(tars: Sequence[Tar], machine: Machine) -> None:
    """Raises ConfigError where a tar alone is more than the cache may hold."""
    largest = max(tars, key=lambda tar: tar.num_bytes)
    if largest.num_bytes > machine.cache_gb * GB:
        needed = gigabytes(largest.num_bytes)
        raise ConfigError(
            f"machine.cache_gb={machine.cache_gb:g}: {largest.url} alone takes {needed} GB; at least that is right"
        )


def gigabytes(num_bytes: float) -> str:
    """Rounded up, so that it is enough."""
    return f"{math.ceil(num_bytes / GB * 10**4) / 10**4:g}"
