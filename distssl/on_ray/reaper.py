"""On a cluster's head: end the cluster when a job is done, whether or not whoever started it still watches."""

from __future__ import annotations

import logging
import sys
import time

from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import prepare_config
from ray.job_submission import JobSubmissionClient

from distssl import settings
from distssl.on_ray import jobs, place

log = logging.getLogger(__name__)

GRACE_S = 60  # for those who watch, to read the end and take the cluster down themselves
POLL_S = 5


def main(job: str) -> None:
    place.start()
    client = JobSubmissionClient()
    while not jobs.wait(client, job, POLL_S):
        pass
    log.info("job %s has ended", job)
    time.sleep(GRACE_S)
    while jobs.running(client):
        log.info("another job is running")
        time.sleep(POLL_S)
    end_all()


def end_all() -> None:
    """Terminate the workers, then this host."""
    config = prepare_config(settings.read_file(place.HEAD_CONFIG.expanduser()))
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    for kind in ("worker", "head"):
        nodes = provider.non_terminated_nodes({"ray-node-type": kind})
        log.info("terminating %d of kind %s", len(nodes), kind)
        if nodes:
            provider.terminate_nodes(nodes)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1])
