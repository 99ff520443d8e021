"""On a cluster's head: end the cluster once it has no work, whether or not whoever started it still watches.

Who watches takes it down at once. Who lost the connection at that moment needs time to notice, to connect again and to
read how the job ended, while the head is still there. `DISTSSL_GRACE_S`, in the environment of jobs, says how long.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time

from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config
from ray.dashboard.utils import get_address_for_submission_client
from ray.job_submission import JobSubmissionClient

from distssl import settings
from distssl.errors import first_line
from distssl.on_ray import jobs, place
from distssl.on_ray.tunnel import Client

log = logging.getLogger(__name__)

NAME = "reaper"
GRACE = "DISTSSL_GRACE_S"
GRACE_S = 300  # without work; the first job has to come within it too
POLL_S = 2


def main() -> None:
    place.start()
    dashboard = get_address_for_submission_client(None)  # of the cluster that the job runs on
    _wait_until_idle(Client(lambda: dashboard), float(os.environ.get(GRACE, GRACE_S)))
    end_all()


def _wait_until_idle(client: JobSubmissionClient, grace_s: float) -> None:
    """Until there has been no work for so long."""
    worked_at = time.monotonic()
    while time.monotonic() - worked_at < grace_s:
        if _has_work(client):
            worked_at = time.monotonic()
        time.sleep(POLL_S)
    log.info("no job has been running for %.0f s", grace_s)


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
