"""A cluster on an AWS without a cloud: what it waits for at its start, and that it ends with its work."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from distssl.on_ray import reaper
from tests import runs
from tests.cluster import scarcity
from tests.cluster.cloud import ALIVE, BUCKET, Cloud
from tests.cluster.test_aws import cluster_file, upload
from tests.cluster.test_faults import nothing_is_left
from tests.cluster.user import User, wait

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # boto3 leaves its connections to the collector
]

GRACE_S = 30
SETTINGS = [*runs.settings(), "eval.tasks=[]", f"data.source=s3://{BUCKET}/shards", "machine.workers=1"]
WAITS = (
    "waiting for workers: hosts for 0 of 1 are up; no worker to be had: InsufficientInstanceCapacity: "
    "We currently do not have sufficient capacity in the zone you requested."
)


def last_step(cloud: Cloud, name: str) -> int:
    """Of a run, as its records in the bucket have it."""
    try:
        text = cloud.client("s3").get_object(Bucket=BUCKET, Key=f"runs/{name}/metrics.jsonl")["Body"].read()
    except ClientError:  # not there yet
        return 0
    return json.loads(text.splitlines()[-1])["step"]


def test_a_run_names_what_it_waits_for_and_the_cluster_of_a_dead_client_ends_with_its_last_job(
    cloud: Cloud, user: User, shared: Path
) -> None:
    upload(cloud, runs.packed(shared / "photos", num=112), "shards")
    ours = {"storage": f"s3://{BUCKET}/runs", "environment": {reaper.GRACE: str(GRACE_S)}}
    file = cluster_file(cloud, shared, distssl=ours)
    cloud.of_hosts["AWS_ENDPOINT_URL_EC2"] = scarcity.URL  # the head's: it is what starts workers
    start = ("--cluster", file, "--down-when-done", *SETTINGS)
    with scarcity.of_hosts() as market:
        waits = user.start("--cluster", file, *SETTINGS, "name=waits")
        waits.until(lambda said: WAITS in said, "what it waits for", 360)
        code, said = user.run("stop", "waits", "--cluster", file, within_s=120)  # no worker is there to be asked
        assert code == 0, said
        assert "ended at once" in said
        assert "no job is running, and the cluster is up: 1 host, " in said
        assert waits.end(60) == 130, waits.said

        first = user.start(*start, "name=first", "train.epochs=100000")
        first.until(lambda said: WAITS in said, "what it waits for", 360)
        market.full = False
        first.until(lambda said: "step " in said, "a step", 360)
        first.kill()

        code, said = user.run(*start, "name=second", f"data.source=s3://{BUCKET}/nothing", within_s=300)
        assert code == 2, said
        assert "job first-1 is running on distssl" in said
        longer, reached = time.monotonic() + GRACE_S + 5, last_step(cloud, "first")
        wait(lambda: time.monotonic() > longer, "a while without the second job", GRACE_S + 10)
        assert last_step(cloud, "first") > reached

        code, said = user.run("stop", "first", "--cluster", file)
        assert code == 0, said
        wait(lambda: not cloud.instances(*ALIVE), "the end of all hosts", GRACE_S + 60)
    saved = cloud.client("s3").list_objects_v2(Bucket=BUCKET, Prefix="runs/first/checkpoints/")["Contents"]
    assert any(one["Key"].endswith("manifest.json") for one in saved)
    code, said = user.run("down", "--cluster", file)  # of the security group, which the head had
    assert code == 0, said
    nothing_is_left(cloud)
