"""What a cluster's dashboard and its TensorBoard show, in Chromium and by their interfaces."""

from __future__ import annotations

import json
import re
import urllib.request

import pytest

from tests.browser import Browser
from tests.cluster.two_hosts import HEAD, WORKER

direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


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
