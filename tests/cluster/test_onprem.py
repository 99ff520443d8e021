"""Hosts of one's own by the list of onprem.yaml, and the same cluster by the address of its dashboard."""

from __future__ import annotations

import pytest

from distssl import monitor
from distssl.downstream import rows
from tests import runs
from tests.cluster.two_hosts import SETTINGS, TwoHosts

pytestmark = [pytest.mark.cloud, pytest.mark.timeout(600)]


def test_two_hosts_by_their_list_and_by_the_address_of_the_dashboard(pair: TwoHosts) -> None:
    user, shared = pair.user, pair.shared
    packed = runs.packed(shared / "photos", num=112)
    file = pair.file()
    code, said = user.run("--cluster", file, "name=list", f"data.source={packed}", *SETTINGS, "train.epochs=2")
    assert code == 0, said
    assert "2 Ray workers" in said
    steps = monitor.read_jsonl(shared / "runs/list" / monitor.METRICS)
    assert steps[-1]["step"] == 2 * (112 // 16)
    assert {row.backbone for row in rows.read_summary(shared / "runs/list")} == {"random", "pretrained"}

    held = user.start("--cluster", file, "name=held", f"data.source={packed}", *SETTINGS, "train.epochs=400")
    held.until(lambda text: "step " in text, "a step", 120)
    (address,) = [line.split()[-1] for line in held.said.splitlines() if line.startswith("dashboard:")]
    code, said = user.run("status", "--address", address)
    assert code == 0, said
    assert "held-1" in said
    assert "running" in said
    code, said = user.run("stop", "held", "--address", address)
    assert code == 0, said
    assert "goes on from the last checkpoint" in said
    assert held.end(60) == 130, held.said
    assert list((shared / "runs/held/checkpoints").glob("step_*"))

    code, said = user.run("down", "--cluster", file)
    assert code == 0, said
