"""Whether a cluster's head is there, and whether Ray answers on it; not on AWS, whose own answer is enough.

For a process of its own, as Ray's launcher ends the one it is called in.
"""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path
from typing import Any

import click
import yaml
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.local.node_provider import record_local_head_state_if_needed
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config

log = logging.getLogger(__name__)

ANSWERS, NONE, SILENT, UNREACHABLE = 0, 10, 11, 12  # exit codes; any other: it could not be found out
CONNECT_S = 20
HEALTH = "RAY_AUTH_MODE=token timeout 60 ray health-check"
PROCESS = "pgrep -x gcs_server > /dev/null; echo pgrep=$?"  # of every head, whoever started it


def look(path: Path) -> int:
    """One of the codes above.

    A cloud knows whether there is a head. What the launcher has noted of hosts that are always there may be of before
    they were rebooted, and another machine's notes are not here: such a host is asked itself.
    """
    config = prepare_config(yaml.safe_load(path.read_text()))
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    of = config["provider"]
    is_local = of["type"] == "local"
    heads = [of["head_ip"]] if is_local else provider.non_terminated_nodes({"ray-node-type": "head"})
    if not heads:
        return NONE
    config = _bootstrap_config(config)
    inside = bool(of.get("use_internal_ips")) and not of.get("use_external_head_ip")  # as the launcher reaches it
    runner = provider.get_command_runner(
        "", heads[0], config["auth"], config["cluster_name"], subprocess, inside, config.get("docker")
    )
    if _said(runner, HEALTH) is not None:
        if is_local:
            record_local_head_state_if_needed(provider)  # or the launcher finds no head to open a tunnel to
        return ANSWERS
    if not is_local:
        return SILENT
    said = _said(runner, PROCESS, run_env="host")
    if said is None:
        return UNREACHABLE
    return NONE if "pgrep=1" in said else SILENT


def _said(runner: Any, command: str, **how: Any) -> str | None:
    """What a command says on the head; None where it fails."""
    try:
        return runner.run(command, timeout=CONNECT_S, exit_on_fail=True, with_output=True, **how).decode()
    except click.ClickException as error:
        log.warning("%s", error.message)
        return None
