"""The model of gloo's all-reduce against gloo, between hosts behind slow links."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import all_reduces, shaped_links
from distssl import estimate
from distssl.estimate import Measured

PLAN = ((1 << 10, 9), (250_000, 5), (1_000_000, 5), (4_000_000, 3))  # bytes, repeats
MBIT_PER_S, DELAY_S = 100, 2e-3


@pytest.mark.cloud
def test_alpha_and_beta_of_two_hosts_predict_four() -> None:
    if os.geteuid() or not Path("/dev/net/tun").exists():
        pytest.skip("hosts behind slow links take root and /dev/net/tun")
    with shaped_links.hosts(4, MBIT_PER_S, DELAY_S) as hosts:
        timed = all_reduces.timed(hosts, [2, 4], PLAN)
    # The fastest of each: what else the machine does only adds.
    measured = [Measured(row["num_bytes"], row["world_size"], min(row["seconds"])) for row in timed]
    links = estimate.fit_links([one for one in measured if one.world_size == 2])
    assert DELAY_S < links.alpha_s < 4 * DELAY_S  # a handshake is there and back
    assert links.beta_s == pytest.approx(8e-6 / MBIT_PER_S, rel=0.15)
    for one in measured:
        assert estimate.all_reduce_s(one.num_bytes, one.world_size, links) == pytest.approx(one.seconds, rel=0.2)
