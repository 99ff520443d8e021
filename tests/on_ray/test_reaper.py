"""How long a cluster without work stays: long enough for who watches, and not for ever."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from distssl.on_ray import jobs, reaper, tunnel
from distssl.on_ray.tunnel import Client
from tests.on_ray.job_server import JobServer

GRACE_S = 1.0


def test_who_lost_the_connection_has_time_to_find_it_again() -> None:
    """It shows at the next status; then a way to the head is to be found, and the end to be read."""
    notices_s = jobs.STATUS_S + tunnel.REQUEST_S
    assert notices_s + tunnel.ANSWERS_S + tunnel.REQUEST_S < reaper.GRACE_S


def test_the_wait_begins_with_the_end_of_the_last_job_and_an_outage_is_no_end(
    server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaper, "POLL_S", 0.05)
    monkeypatch.setattr(tunnel, "REQUEST_S", GRACE_S / 2)
    client = Client(lambda: server.url)
    with ThreadPoolExecutor(1) as pool:
        idle = pool.submit(reaper._wait_until_idle, client, GRACE_S)
        time.sleep(2 * GRACE_S)
        server.mute = "all"
        time.sleep(2 * GRACE_S)
        assert not idle.done()
        ended = time.monotonic()
        server.end_job(status="SUCCEEDED")
        server.mute = None
        idle.result(timeout=30)
        assert time.monotonic() - ended > GRACE_S / 2  # work was seen last a moment before its end
