"""Runs on each spot host beside Ray, by itself: when the cloud says it takes the host away, has Ray drain the node.

The workers of a run then save a checkpoint and are started again without it, while its replacement is on its way. The
notice is read from AWS's instance metadata (version 2, with a session token), which has it two minutes ahead:
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html. The file is copied to hosts
and must need nothing but Python and Ray's command.
"""

import datetime
import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request

METADATA = "http://169.254.169.254"
POLL_S = 5

log = logging.getLogger("spot_watcher")


def fetch(path: str, method: str = "GET", **headers: str) -> str | None:
    """What the metadata service says; None where there is no such thing."""
    request = urllib.request.Request(METADATA + path, method=method)
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def seconds_left() -> int | None:
    """Until this host is taken away; None while nobody has said so."""
    token = fetch("/latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
    notice = fetch("/latest/meta-data/spot/instance-action", X_aws_ec2_metadata_token=token or "")
    if notice is None:
        return None
    when = datetime.datetime.fromisoformat(json.loads(notice)["time"].replace("Z", "+00:00"))
    return max(1, int((when - datetime.datetime.now(datetime.timezone.utc)).total_seconds()))


def drain(left_s: int) -> None:
    reason = "the cloud takes the spot host away"
    subprocess.run(
        [
            *("ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", reason),
            *("--deadline-remaining-seconds", str(left_s)),
        ],
        check=True,
    )


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(message)s")
    while True:
        try:
            left_s = seconds_left()
            if left_s is not None:
                log.info("a notice: %d s left", left_s)
                drain(left_s)
                log.info("draining")
                return
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            log.warning("%s", error)  # tried again: the service may be slow, and Ray not be there yet
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
