"""Hosts of one's own by the list of onprem.yaml: runs on two of them, what Chromium shows of one at the addresses that
launch.py prints, through its tunnel, and the same cluster by the address of its dashboard."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest

from distssl import monitor
from distssl.downstream import rows
from tests import browser, buckets, runs
from tests.browser import Browser
from tests.cluster.two_hosts import HEAD, SETTINGS, WORKER, TwoHosts
from tests.cluster.user import wait

pytestmark = [pytest.mark.cloud, pytest.mark.timeout(600)]

BUCKET = "distssl-test"
BEHIND_S = 30  # TensorBoard may be that much behind the terminal
LONG = [*SETTINGS, "train.epochs=4000", "train.log_every=200"]
direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def test_the_pages_of_a_run_on_two_hosts_show_it_also_after_the_connection_was_cut(
    chromium: str, pair: TwoHosts, store: buckets.Server, shared: Path
) -> None:
    user = pair.user
    storage = f"{store.make_bucket(BUCKET)}/runs"
    file, packed = pair.file(), runs.packed(shared / "photos", num=112)
    start = ["--cluster", file, f"data.source={packed}", *LONG]
    run = user.start(*start, "name=seen", "--storage", storage)
    run.until(lambda said: "TensorBoard:" in said, "the addresses", 240)
    dashboard, token, board = (printed(run.said, name) for name in ("dashboard", "its token", "TensorBoard"))

    password = (shared / "home" / token.removeprefix("cat ~/")).read_text()
    run.until(lambda said: "step " in said, "the first line of its log", 240)
    ((step, loss),) = re.findall(r"^step (\d+)/.* loss ([\d.]+)", run.said, re.MULTILINE)
    wait(lambda: int(step) in losses(board), "the loss in TensorBoard", BEHIND_S, lambda: run.said)
    assert losses(board)[int(step)] == pytest.approx(float(loss), abs=1e-3)
    with browser.started(shared / "profile") as page:
        check_curve(page, board)
        page.open(f"{dashboard}/#/jobs")
        log_in(page, password)
        check_jobs(page)
        check_hosts(page, dashboard)
        assert train_runs(dashboard, password) == [("seen", "RUNNING")]

        pair.network.hosts["head"].hang_up()
        run.until(lambda said: "the connection is lost" in said, "that the connection is lost", 60)
        run.until(lambda said: "step " in said.partition("the connection is lost")[2], "another step", 120)
        assert losses(board)
        page.open("about:blank")
        page.open(f"{dashboard}/#/jobs")
        check_jobs(page)

    code, said = user.run("status", "--address", dashboard)
    assert code == 0, said
    assert "seen-1" in said
    assert "running" in said
    code, said = user.run("stop", "seen", "--address", dashboard)
    assert code == 0, said
    assert "goes on from the last checkpoint" in said
    assert run.end(60) == 130, run.said
    kept = store.client().list_objects_v2(Bucket=BUCKET, Prefix="runs/seen/checkpoints/step_")
    assert kept["KeyCount"]

    other = user.start("--cluster", file, f"data.source={packed}", *SETTINGS, "name=other", "train.epochs=2")
    other.until(lambda said: "TensorBoard:" in said, "the addresses", 120)
    board = printed(other.said, "TensorBoard")
    wait(lambda: location(board) == str(shared / "runs"), "a TensorBoard of the other storage", 60)
    assert other.end(240) == 0, other.said
    assert "2 Ray workers" in other.said
    steps = monitor.read_jsonl(shared / "runs/other" / monitor.METRICS)
    assert steps[-1]["step"] == 2 * (112 // 16)
    assert {row.backbone for row in rows.read_summary(shared / "runs/other")} == {"random", "pretrained"}
    code, said = user.run("down", "--cluster", file)
    assert code == 0, said


def printed(said: str, name: str) -> str:
    (found,) = re.findall(rf"^{name}: +(.*)$", said, re.MULTILINE)
    return found


def losses(board: str) -> dict[int, float]:
    """The loss by step, as TensorBoard has it; none where it does not answer yet or has no such curve."""
    try:
        with direct.open(f"{board}/data/plugin/scalars/scalars?run=seen&tag=loss", timeout=10) as answer:
            return {step: value for _, step, value in json.load(answer)}
    except OSError:
        return {}


def location(board: str) -> str | None:
    """Of the runs that TensorBoard shows; None where it does not answer."""
    try:
        with direct.open(f"{board}/data/environment", timeout=10) as answer:
            return json.load(answer)["data_location"]
    except OSError:
        return None


def check_curve(page: Browser, board: str) -> None:
    """A card of the run's loss, with the last point of the curve."""
    page.open(f"{board}/?tagFilter=^loss$#timeseries")
    row = r"/seen\s+\S+\s+(\S+)\s+(\d+)\s/"  # smoothed, value, step
    value, step = page.wait_for(f"every('scalar-card').map(e => e.innerText.match({row})).find(e => e)?.slice(1)")
    assert float(value) == pytest.approx(losses(board)[int(step)], abs=1e-4)


def log_in(page: Browser, token: str) -> None:
    """It shows nothing without the token, nor with another."""
    page.wait_for("every('[role=dialog] input').length == 1")
    submit(page, "another")
    page.wait_for("every('[role=dialog]')[0].innerText.includes('Invalid authentication token')")
    assert "seen" not in page.evaluate("document.body.innerText")
    submit(page, token)


def submit(page: Browser, token: str) -> None:
    page.type("[role=dialog] input", token)
    button = "every('[role=dialog] button').find(e => e.innerText == 'SUBMIT')"
    page.wait_for(f"!{button}.disabled")
    page.evaluate(f"{button}.click()")


def check_jobs(page: Browser) -> None:
    """The run by its name, with its job and state, and TensorBoard beside it."""
    jobs = table(page, "seen-1", "tensorboard-1")
    assert {(job["Name"], job["Submission ID"], job["Status"]) for job in jobs} == {
        ("seen", "seen-1", "RUNNING"),
        ("tensorboard", "tensorboard-1", "RUNNING"),
    }


def check_hosts(page: Browser, dashboard: str) -> None:
    page.open(f"{dashboard}/#/cluster")
    found = table(page, f"{HEAD} (Head)", WORKER)
    assert {(host["Host / Worker Process name"], host["State"]) for host in found} == {
        ("head", "ALIVE"),
        ("worker", "ALIVE"),
    }


def train_runs(dashboard: str, token: str) -> list[tuple[str, str]]:
    """Name and state of Train's runs, by the dashboard's interface."""
    request = urllib.request.Request(f"{dashboard}/api/train/v2/runs/v1", headers={"Authorization": f"Bearer {token}"})
    with direct.open(request, timeout=60) as answer:
        return [(run["name"], run["status"]) for run in json.load(answer)["train_runs"]]


def table(page: Browser, *wanted: str) -> list[dict[str, str]]:
    """The rows of the page's table by the names of its columns, once all that is wanted is in it."""
    cells = "every('tr').map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    with_all = " && ".join(f"rows.some(row => row.includes({json.dumps(one)}))" for one in wanted)
    head, *rows = page.wait_for(f"(rows => rows.length > {len(wanted)} && {with_all} && rows)({cells})")
    return [dict(zip(head, row, strict=True)) for row in rows]
