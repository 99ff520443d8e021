"""On a cluster's head: end the cluster once it has no work, whether or not whoever started it still watches."""

from __future__ import annotations

import logging
import subprocess
import time

from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config
from ray.job_submission import JobSubmissionClient

from distssl import settings
from distssl.errors import first_line
from distssl.on_ray import jobs, place

log = logging.getLogger(__name__)

NAME = "reaper"
GRACE_S = 30  # for those who watch, to read the end and take the cluster down themselves; and for the first job to come
POLL_S = 2


def main() -> None:
    place.start()
    client = JobSubmissionClient()
    worked_at = time.monotonic()
    while time.monotonic() - worked_at < GRACE_S:
        if _has_work(client):
            worked_at = time.monotonic()
        time.sleep(POLL_S)
    log.info("no job has been running for %d s", GRACE_S)
    end_all()


def _has_work(client: JobSubmissionClient) -> bool:
    """Where nobody answers, there may be."""
    try:
        return bool(jobs.at_work(client))
    except jobs.LOST as error:
        log.warning("%s", first_line(error))
        return True


def end_all() -> None:
    """Terminate the workers, then this host; on hosts that are always there, Ray, without which workers end too."""
    config = prepare_config(settings.read_file(place.HEAD_CONFIG.expanduser()))
    if config["provider"]["type"] == "local":  # whose provider would only note it
        subprocess.Popen(["ray", "stop"], start_new_session=True)
        return
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for kind in ("worker", "head"):
        nodes = provider.non_terminated_nodes({"ray-node-type": kind})
        log.info("terminating %d of kind %s", len(nodes), kind)
        if nodes:
            provider.terminate_nodes(nodes)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
