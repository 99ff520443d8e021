"""What of a cluster is there: whether it has a head, whether Ray answers on it, what Ray's launcher notes of it.

For a process of its own, as Ray's launcher ends the one it is called in.
"""

from __future__ import annotations

import logging
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import yaml
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.local.node_provider import record_local_head_state_if_needed
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import STATUS_UP_TO_DATE, STATUS_UPDATE_FAILED

from distssl.on_ray import scale

log = logging.getLogger(__name__)

# States of a cluster. HEADLESS: hosts run without a head.
ANSWERS, NONE, SETTING_UP, SILENT, UNREACHABLE = "answers", "none", "being set up", "silent", "unreachable"
HEADLESS = "headless"
CONNECT_S = 20
# With what the head was started with, in the same connection.
HEALTH = f"RAY_AUTH_MODE=token timeout 30 ray health-check && {{ cat ~/.distssl/{scale.NAME} 2> /dev/null || true; }}"
PROCESS = "pgrep -x gcs_server > /dev/null; echo pgrep=$?"  # of every head, whoever started it


@dataclass(frozen=True)
class Found:
    """state: one of the above. hosts: {"id", "type" (the node type)} of those that a cloud runs.

    status: of a head that does not answer, in Ray's words. started: the `scale` of a head that answers, if it is known.
    """

    state: str
    hosts: list[dict[str, str]] = field(default_factory=list)
    status: str = ""
    started: scale.Scale | None = None


def look(path: Path) -> Found:
    """What is there of the cluster of Ray's file at `path`.

    A cloud knows whether there is a head. What the launcher has noted of hosts that are always there may be of before
    they were rebooted, and another machine's notes are not here: such a host is asked itself.
    """
    config = prepare_config(yaml.safe_load(path.read_text()))
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    if config["provider"]["type"] == "local":
        return _look_at(config, provider, config["provider"]["head_ip"], [])
    nodes = {node: provider.node_tags(node) for node in provider.non_terminated_nodes({})}
    hosts = [{"id": node, "type": tags.get("ray-user-node-type", "")} for node, tags in nodes.items()]
    heads = {node: tags for node, tags in nodes.items() if tags.get("ray-node-type") == "head"}
    statuses = {node: tags.get("ray-node-status", "") for node, tags in heads.items()}
    if not statuses:
        return Found(HEADLESS if hosts else NONE, hosts)
    ready = [node for node, status in statuses.items() if status == STATUS_UP_TO_DATE]
    if ready:
        return _look_at(config, provider, ready[-1], hosts)  # the one that the launcher takes
    status = next(iter(statuses.values()))
    return Found(SILENT if status == STATUS_UPDATE_FAILED else SETTING_UP, hosts, status)


def _look_at(config: dict[str, Any], provider: Any, head: str, hosts: list[dict[str, str]]) -> Found:
    """Ask the head itself."""
    of = config["provider"]
    is_local = of["type"] == "local"
    config = _bootstrap_config(config)
    inside = bool(of.get("use_internal_ips")) and not of.get("use_external_head_ip")  # as the launcher reaches it
    runner = provider.get_command_runner(
        "", head, config["auth"], config["cluster_name"], subprocess, inside, config.get("docker")
    )
    said = _said(runner, HEALTH)
    if said is not None:
        if is_local:
            record_local_head_state_if_needed(provider)  # or the launcher finds no head to open a tunnel to
        return Found(ANSWERS, hosts, started=scale.parse(said))
    said = _said(runner, PROCESS, run_env="host")
    if said is None:
        return Found(UNREACHABLE, hosts)
    return Found(NONE if is_local and "pgrep=1" in said else SILENT, hosts)


def note(path: Path) -> None:
    """Have Ray's launcher know of the head that the file's list of hosts names, where it has noted that it is none.

    So it has after a `down` that could not reach the head, and on a machine that did not bring the cluster up.
    """
    config = prepare_config(yaml.safe_load(path.read_text()))
    record_local_head_state_if_needed(_get_node_provider(config["provider"], config["cluster_name"]))


def _said(runner: Any, command: str, **how: Any) -> str | None:
    """What a command says on the head; None where it fails."""
    try:
        return runner.run(command, timeout=CONNECT_S, exit_on_fail=True, with_output=True, **how).decode()
    except click.ClickException as error:
        log.warning("%s", error.message)
        return None
