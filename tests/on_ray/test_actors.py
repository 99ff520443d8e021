"""The actors beside a driver on a real Ray: gauges, read where Prometheus reads them, and the desk."""

from __future__ import annotations

import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from distssl.errors import RunError
from distssl.on_ray import desk
from distssl.on_ray.gauges import GAUGES, Gauges

METRICS = {shown.metric: number + 0.5 for number, shown in enumerate(GAUGES.values())}
EXPIRY_S = 2  # two of Ray's report intervals


class Scrape:
    """The metrics page of the one node of a Ray."""

    def __init__(self) -> None:
        (node,) = ray.nodes()
        self.url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def gauges(self) -> dict[str, tuple[float, dict[str, str]]]:
        """Value and labels of each gauge of ours."""
        with self._open(self.url, timeout=30) as answer:
            lines = re.findall(r"^ray_distssl_(\w+)\{(.*)\} (\S+)$", answer.read().decode(), re.MULTILINE)
        return {name: (float(value), dict(re.findall(r'(\w+)="(.*?)"', labels))) for name, labels, value in lines}

    def wait_for(self, number: int) -> None:
        until = time.monotonic() + 60
        while len(self.gauges()) != number:
            assert time.monotonic() < until, f"not {number} but {sorted(self.gauges())}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def scrape() -> Iterator[Scrape]:
    short = tempfile.TemporaryDirectory(prefix="ray-")  # pytest's are too long for Ray's sockets
    with pytest.MonkeyPatch.context() as patch, short as folder:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", _temp_dir=folder)
        try:
            yield Scrape()
        finally:
            ray.shutdown()


def run_of(scrape: Scrape) -> ray.actor.ActorHandle:
    started = ray.remote(Gauges).remote("demo", "simclr")
    ray.get(started.record.remote(METRICS | {"of_no_gauge": 1.0}))
    scrape.wait_for(len(GAUGES))
    return started


def test_gauges_stay_while_the_run_goes_on_and_are_gone_when_it_ends(scrape: Scrape) -> None:
    started = run_of(scrape)
    until = time.monotonic() + 3 * EXPIRY_S
    while time.monotonic() < until:
        shown = scrape.gauges()
        assert {GAUGES[name].metric: value for name, (value, _) in shown.items()} == METRICS
        time.sleep(0.1)
    for _, labels in shown.values():
        assert (labels["run"], labels["method"]) == ("demo", "simclr")
        assert labels["SessionName"].startswith("session_")
    ray.get(started.close.remote())
    scrape.wait_for(0)

    killed = run_of(scrape)
    ray.kill(killed)
    scrape.wait_for(0)


def ask_until_it_is_gone(the_desk: Any) -> None:
    """It may still answer right after the kill."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        desk.outcomes(the_desk)


@pytest.mark.usefixtures("scrape")
def test_a_desk_that_is_gone_is_told_in_one_line() -> None:
    opened = desk.open_unnamed()
    desk.tell(opened, 0, "all of it")
    assert desk.result(desk.outcomes(opened)) == "all of it"
    ray.kill(opened)
    with pytest.raises(RunError, match=r"^Ray lost the actor that this run's workers report to: .*ray\.kill") as caught:
        ask_until_it_is_gone(opened)
    assert "\n" not in str(caught.value)
