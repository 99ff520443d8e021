"""Debian's Prometheus scrapes a real run, found by the files that Ray writes for it, and is asked what it saw."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from distssl import config, monitor
from distssl.on_ray.gauges import GAUGES
from tests import debian, processes, runs
from tests.object_server import ObjectServer

pytestmark = pytest.mark.cloud

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 240  # for anything a busy machine may take its time with
EPOCHS, STEPS_PER_EPOCH = 4, 7
DASHBOARD = json.loads((ROOT / "cluster/grafana/distssl.json").read_text())


class Prometheus:
    """One that is running, at a URL, and what it says."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def ask(self, path: str, **parameters: str | float) -> Any:
        """An answer's data. Raises HTTPError where it is no answer, as for an expression that is none."""
        with self._open(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def samples(self, selector: str) -> list[tuple[float, float]]:
        """Times and values of the one series of a selector over the last hour."""
        found = self.ask("query", query=f"{selector}[1h]")["result"]
        assert len(found) == 1, found
        return [(at, float(value)) for at, value in found[0]["values"]]


@pytest.fixture(scope="module")
def program() -> str:
    if shutil.which("prometheus") is None:
        if reason := debian.install(["prometheus"]):
            pytest.skip(reason)
        if Path("/run/systemd/system").exists():  # the package starts a service, which nobody asked for
            subprocess.run(["systemctl", "disable", "--now", "prometheus"], check=True, capture_output=True)
    return "prometheus"


@contextmanager
def scraping(program: str, configuration: Path, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus on loopback that stores what it scrapes in the folder."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    line = [program, f"--config.file={configuration}", f"--storage.tsdb.path={folder}/data"]
    with open(folder / "prometheus.log", "w") as log:
        process = subprocess.Popen([*line, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextmanager
def training(run: config.Run, storage: Path, tmpdir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`launch.py pretrain` with two Ray workers, whose Ray keeps its files in tmpdir and reports every second."""
    (storage / "run.yaml").write_text(config.dump(run))
    with open(storage / "driver.log", "w") as log:
        driver = subprocess.Popen(
            [sys.executable, "launch.py", "pretrain", "--config", storage / "run.yaml", "--workers=2"],
            cwd=ROOT,
            env=os.environ | {"RAY_TMPDIR": str(tmpdir), "RAY_metrics_report_interval_ms": "1000"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    seen: set[processes.Process] = set()
    try:
        yield driver
        seen = processes.below(driver.pid)
    finally:
        seen |= processes.below(driver.pid)
        driver.kill()
        driver.wait()
        for process in seen:
            process.kill()


def ray_configuration(tmpdir: Path, driver: subprocess.Popen[bytes]) -> str:
    """The prometheus.yml that Ray writes into the folder of its session, once the file it refers to is there."""
    until = time.monotonic() + WAIT_S
    while True:
        assert driver.poll() is None
        assert time.monotonic() < until
        for path in tmpdir.glob("ray/session_2*/metrics/prometheus/prometheus.yml"):
            if (path.parent.parent.parent / "prom_metrics_service_discovery.json").exists():
                return path.read_text()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def watched(program: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Path]]:
    """A Prometheus that has watched a run from its start to its end, and the run folder."""
    storage = tmp_path_factory.mktemp("watched")
    overrides = [
        f"train.epochs={EPOCHS}",
        "eval.every=2",
        "eval.tasks=[knn,linear]",
        "eval.labels=[20,30,40,50,60,null]",
    ]
    shards = ObjectServer(runs.packed(storage / "photos"))
    run = runs.tiny(Path("shards"), storage, "name=watched", f"data.source={shards.url}", *overrides)
    tmpdir = Path(tempfile.mkdtemp(prefix="ray-"))  # pytest's are too long for Ray's sockets
    with training(run, storage, tmpdir) as driver:
        of_ray = ray_configuration(tmpdir, driver)
        assert "scrape_interval: 10s" in of_ray
        (storage / "prometheus.yml").write_text(of_ray.replace("10s", "1s"))
        with scraping(program, storage / "prometheus.yml", storage) as prometheus:
            assert driver.wait(WAIT_S) == 0, (storage / "driver.log").read_text()
            yield prometheus, run.run_dir
    shards.stop()
    shutil.rmtree(tmpdir)


def logged(run_dir: Path, metric: str) -> list[float]:
    return [row[metric] for row in monitor.read_jsonl(run_dir / monitor.METRICS) if metric in row]


@pytest.mark.parametrize("name", sorted(GAUGES))
def test_prometheus_has_seen_what_the_run_logged(watched: tuple[Prometheus, Path], name: str) -> None:
    prometheus, run_dir = watched
    seen = [value for _, value in prometheus.samples(f'ray_distssl_{name}{{run="watched", method="simclr"}}')]
    told = logged(run_dir, GAUGES[name].metric)
    assert set(seen) <= set(told)
    assert seen[-1] in told[-STEPS_PER_EPOCH:]  # a report and a scrape take no longer than the last epoch and its end


def test_the_gauges_of_a_scrape_are_of_one_step(watched: tuple[Prometheus, Path]) -> None:
    prometheus, run_dir = watched
    rows = [row for row in monitor.read_jsonl(run_dir / monitor.METRICS) if "loss" in row]
    steps = {(name, row[name]): row["step"] for row in rows for name in ("epoch", "loss", "gradient_norm")}
    assert len(steps) == 3 * EPOCHS * STEPS_PER_EPOCH
    epochs = prometheus.samples("ray_distssl_epoch")
    for name in ("loss", "gradient_norm"):
        values = prometheus.samples(f"ray_distssl_{name}")
        assert [at for at, _ in values] == [at for at, _ in epochs]
        pairs = [(steps["epoch", e], steps[name, v]) for (_, e), (_, v) in zip(epochs, values, strict=True)]
        assert sum(abs(one - other) > 1 for one, other in pairs) <= 1  # one may come while a report is taken in


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def metrics_of(expression: str) -> set[str]:
    """The metrics a PromQL expression refers to: names that are no label, keyword, function, string or duration."""
    expression = re.sub(r'"(\\.|[^"\\])*"', "", expression)
    expression = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", expression)
    expression = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", expression)
    names = re.findall(r"(?<![\w.$])[a-zA-Z_:][\w:]*(?![\w:]*\s*\()", expression)
    return set(names) - {"and", "or", "unless", "bool", "offset"}


def test_a_promql_expression_is_read_right() -> None:
    expression = (
        'sum by (a, b) (rate(x_total{c=~"y.*", d="}"}[5m] offset 1h)) / on(e) group_left(f) z:w > bool 2e3 or up'
    )
    assert metrics_of(expression) == {"x_total", "z:w", "up"}


def of_gpus() -> set[str]:
    """Ray exports these where there is a GPU; elsewhere its own list says that they exist."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    return {f"ray_{name}" for name in METRICS_GAUGES if re.match("node_(gpu|gram)", name)}


def test_every_metric_of_the_grafana_dashboard_exists(watched: tuple[Prometheus, Path]) -> None:
    prometheus, _ = watched
    there = set(prometheus.ask("label/__name__/values"))
    variables = [
        variable["query"]["query"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"
    ]
    of_variables = [re.fullmatch(r"label_values\((.*), (\w+)\)", query) for query in variables]
    used = {name for expression in expressions(DASHBOARD) for name in metrics_of(expression)}
    used |= {name for found in of_variables if found for name in metrics_of(found[1])}
    assert {f"ray_distssl_{name}" for name in GAUGES} <= used
    assert not used - there - of_gpus()
    for found in of_variables:
        assert found
        assert prometheus.ask(f"label/{found[2]}/values")


def test_every_panel_of_the_grafana_dashboard_shows_something(watched: tuple[Prometheus, Path]) -> None:
    """Each expression has a value at a time of the run, with Grafana's variables filled in."""
    prometheus, _ = watched
    # Ray drops a node's metrics between two of its own reports, so one moment may be between them.
    times = [at for at, _ in prometheus.samples("ray_distssl_knn")]
    span = {"start": times[0], "end": times[-1], "step": 1}
    for expression in expressions(DASHBOARD):
        filled = expression.replace("$run", "watched").replace("$method", "simclr").replace("$session", ".+")
        assert "$" not in filled
        found = prometheus.ask("query_range", query=filled, **span)["result"]
        assert bool(found) != (metrics_of(expression) <= of_gpus()), expression
