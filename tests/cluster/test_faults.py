"""What goes wrong on the way up ends in one line, and leaves nothing running."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest

from tests.cluster import scarcity
from tests.cluster.cloud import ALIVE, ENDPOINT, Cloud
from tests.cluster.test_aws import cluster_file
from tests.cluster.user import User

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # boto3 leaves its connections to the collector
]


def fails(user: User, file: Path, told: str, code: int, **environment: str) -> None:
    user.environment = {**user.environment, **environment}
    left, said = user.run("--cluster", file, "--detach", within_s=200)
    assert left == code, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, said
    assert told in errors[0]


def look_at_keys_after(num_requests: int) -> None:
    """Have moto look at keys, as AWS does, but for its next requests."""
    asked = urllib.request.Request(f"{ENDPOINT}/moto-api/reset-auth", str(num_requests).encode(), method="POST")
    asked.add_header("Content-Type", "text/plain")
    urllib.request.urlopen(asked).close()


def nothing_is_left(cloud: Cloud) -> None:
    assert not cloud.instances(*ALIVE)
    groups = cloud.client("ec2").describe_security_groups()["SecurityGroups"]
    assert {group["GroupName"] for group in groups} == {"default"}


def test_no_credentials(cloud: Cloud, user: User, shared: Path) -> None:
    user.environment = {name: value for name, value in user.environment.items() if "KEY" not in name}
    fails(user, cluster_file(cloud, shared), "no AWS credentials", 2)
    nothing_is_left(cloud)


def test_wrong_credentials(cloud: Cloud, user: User, shared: Path) -> None:
    file = cluster_file(cloud, shared)
    look_at_keys_after(0)
    try:
        fails(user, file, "AWS refuses", 2, AWS_ACCESS_KEY_ID="AKIAWRONG")
    finally:
        look_at_keys_after(10**6)
    nothing_is_left(cloud)


def test_an_image_that_does_not_exist(cloud: Cloud, user: User, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "image", "ami-0000000000000dead")
    file = cluster_file(cloud, shared)
    left, said = user.run("--cluster", file, "--detach")
    assert left == 2, said
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 2  # the head's and the workers'
    assert all("ImageId=ami-0000000000000dead: no such image in us-west-2" in line for line in errors)
    nothing_is_left(cloud)


def test_no_capacity(cloud: Cloud, user: User, shared: Path) -> None:
    with scarcity.of_hosts():
        fails(user, cluster_file(cloud, shared), "InsufficientInstanceCapacity", 1, AWS_ENDPOINT_URL=scarcity.URL)
    nothing_is_left(cloud)


def test_a_head_that_never_answers_ssh(cloud: Cloud, user: User, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "boots", lambda instance: False)
    file = cluster_file(cloud, shared)
    fails(user, file, "the head does not answer SSH", 1, AUTOSCALER_NODE_START_WAIT_S="10")
    nothing_is_left(cloud)


def test_a_head_that_dies_while_it_is_set_up(cloud: Cloud, user: User, shared: Path) -> None:
    file = cluster_file(cloud, shared, setup_commands=["echo setting up; touch ~/half; sleep 60"])
    command = user.start("--cluster", file, "--detach")
    command.until(lambda said: any(host.has("root/half") for host in cloud.network.hosts.values()), "set-up", 120)
    for host in list(cloud.network.hosts.values()):
        host.power_off()
    assert command.end(200) == 1, command.said
    assert "Traceback" not in command.said
    (error,) = [line for line in command.said.splitlines() if line.startswith("error:")]
    assert "nothing is left running" in error
    nothing_is_left(cloud)


def test_a_client_that_dies_while_it_sets_a_head_up_leaves_one_that_the_next_command_names(
    cloud: Cloud, user: User, shared: Path
) -> None:
    file = cluster_file(cloud, shared, setup_commands=["echo setting up; touch ~/half; sleep 600"])
    command = user.start("--cluster", file, "--detach")
    command.until(lambda said: any(host.has("root/half") for host in cloud.network.hosts.values()), "set-up", 120)
    command.kill()
    ends = f"end it: python launch.py down --cluster {file}"
    fails(user, file, "the command that set up the head of distssl was cut off (1 host, about 0.10 USD an hour", 1)
    assert ends in user.commands[-1].said
    assert len(cloud.instances(*ALIVE)) == 1
    code, said = user.run("down", "--cluster", file)
    assert code == 0, said
    nothing_is_left(cloud)


@pytest.mark.slow  # tests/on_ray/test_cluster.py has it without hosts
def test_two_commands_at_once_bring_up_one_head(cloud: Cloud, user: User, shared: Path) -> None:
    file = cluster_file(cloud, shared)
    verify = ("verify", "--methods", "simsiam", "--world-sizes", "1", "--cluster", file, "--detach")
    before = {one["InstanceId"] for one in cloud.instances()}
    commands = [user.start(*verify) for _ in range(2)]
    assert [command.end(300) for command in commands] == [0, 0], [command.said for command in commands]
    assert sum("is up after" in command.said for command in commands) == 1
    came = [one for one in cloud.instances() if one["InstanceId"] not in before]
    assert len([one for one in came if one["InstanceType"] == "m5.large"]) == 1
    assert all("distssl stays up: " in command.said for command in commands)
    code, said = user.run("down", "--cluster", file)
    assert code == 0, said
    nothing_is_left(cloud)
