"""An AWS without a cloud: moto answers EC2, IAM, S3 and STS; an instance of its is a host made of namespaces.

A spot instance's notice is given where a real one finds it, at http://169.254.169.254 with a session token.
"""

from __future__ import annotations

import contextlib
import datetime
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

from tests.cluster import hosts
from tests.cluster.user import wait

MOTO_PORT = 5555
ENDPOINT = f"http://{hosts.GATEWAY}:{MOTO_PORT}"
REGION, ZONE = "us-west-2", "us-west-2a"
BUCKET = "distssl-test"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": REGION}
SPOT_S = 40  # from a notice to the end of the instance; two minutes on the real one
ALIVE = ("pending", "running")
IAM = Path(__file__).parent.parent.parent / "cluster" / "iam"


class Cloud:
    """Use as a context manager, which also takes this thread into its network.

    `environment` is that of a user of this AWS; `vpc`, `subnet` and `image` are what their cluster file names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.network = hosts.Network(folder / "net")
        self.home = folder / "home"
        self.boots: Callable[[dict[str, Any]], bool] = lambda instance: True  # whether one that is started comes up
        self.of_hosts = {"AWS_ENDPOINT_URL": ENDPOINT, "AWS_DEFAULT_REGION": REGION}  # their environment
        self.log: list[str] = []
        self._stop = threading.Event()

    def __enter__(self) -> Cloud:
        (self.folder / "net").mkdir(parents=True)
        self.home.mkdir()
        self.network.__enter__()
        self._inside = self.network.inside()
        self._inside.__enter__()
        with open(self.folder / "moto.log", "wb") as log:
            self._moto = subprocess.Popen(
                [Path(sys.executable).parent / "moto_server", "-H", hosts.GATEWAY, "-p", str(MOTO_PORT)],
                env=os.environ | KEYS | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
                stdout=log,
                stderr=log,
            )
        self._metadata = Metadata()
        threading.Thread(target=self._metadata.serve_forever, daemon=True).start()
        self._seed()
        self._thread = threading.Thread(target=self._hypervise, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(60)
        self._metadata.shutdown()
        self._metadata.server_close()
        self._moto.kill()
        self._moto.wait()
        self._inside.__exit__(None, None, None)
        self.network.__exit__()

    @property
    def environment(self) -> dict[str, str]:
        bare = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
        return bare | KEYS | {"HOME": str(self.home), "AWS_ENDPOINT_URL": ENDPOINT, "AWS_EC2_METADATA_DISABLED": "true"}

    def client(self, service: str) -> Any:
        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=ENDPOINT,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )

    def instances(self, *states: str) -> list[dict[str, Any]]:
        """Those in some states, by default all that there ever were."""
        pages = self.client("ec2").get_paginator("describe_instances").paginate()
        found = [one for page in pages for group in page["Reservations"] for one in group["Instances"]]
        return [one for one in found if not states or one["State"]["Name"] in states]

    def give_notice(self, instance: dict[str, Any]) -> None:
        """Tell a spot instance that it ends, and end it when it is time."""
        ends = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=SPOT_S)
        self._metadata.notices[instance["PrivateIpAddress"]] = ends.strftime("%Y-%m-%dT%H:%M:%SZ")

        def end() -> None:
            with self.network.inside():
                self.client("ec2").terminate_instances(InstanceIds=[instance["InstanceId"]])

        timer = threading.Timer(SPOT_S, end)
        timer.daemon = True
        timer.start()

    def _seed(self) -> None:
        ec2 = self.client("ec2")
        wait(lambda: _answers(ec2), "an answer of moto", 60)
        self.vpc = ec2.create_vpc(CidrBlock=f"{hosts.PREFIX}.0/16")["Vpc"]["VpcId"]
        made = ec2.create_subnet(VpcId=self.vpc, CidrBlock=f"{hosts.PREFIX}.0/24", AvailabilityZone=ZONE)
        self.subnet = made["Subnet"]["SubnetId"]
        self.image = ec2.describe_images()["Images"][0]["ImageId"]
        where = {"LocationConstraint": REGION}
        self.client("s3").create_bucket(Bucket=BUCKET, CreateBucketConfiguration=where)
        iam = self.client("iam")
        for name in ("head", "worker"):
            role = f"distssl-{name}"
            iam.create_role(RoleName=role, AssumeRolePolicyDocument=(IAM / "trust.json").read_text())
            for policy in sorted(IAM.glob(f"{name}*.json")):
                text = policy.read_text().replace("FILL_IN_BUCKET", BUCKET)
                iam.put_role_policy(RoleName=role, PolicyName=policy.stem, PolicyDocument=text)
            iam.create_instance_profile(InstanceProfileName=role)
            iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)

    def _hypervise(self) -> None:
        """Every instance that is started gets a host, and loses it when it is ended."""
        on: dict[str, hosts.Host | None] = {}
        with self.network.inside():
            while not self._stop.is_set():
                try:
                    found = self.instances()
                except BotoCoreError:  # moto is being ended
                    return
                except ClientError:  # a test has it look at keys
                    found = []
                for one in found:
                    name, alive = one["InstanceId"], one["State"]["Name"] in ALIVE
                    if alive and name not in on:
                        on[name] = self._boot(one) if self.boots(one) else None
                    elif not alive and (host := on.get(name)):
                        self._note("off", one)
                        on[name] = host.power_off()
                self._stop.wait(0.5)
            for host in filter(None, on.values()):
                host.power_off()

    def _boot(self, one: dict[str, Any]) -> hosts.Host:
        self._note("on", one)
        keys = self.client("ec2").describe_key_pairs(KeyNames=[one["KeyName"]], IncludePublicKey=True)["KeyPairs"]
        self._metadata.roles[one["PrivateIpAddress"]] = one["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        return self.network.host(one["InstanceId"], one["PrivateIpAddress"], keys[0]["PublicKey"], **self.of_hosts)

    def _note(self, what: str, one: dict[str, Any]) -> None:
        kind = one.get("InstanceLifecycle", "on demand")
        self.log.append(f"{time.strftime('%H:%M:%S')} {what} {one['InstanceId']} {one['InstanceType']} {kind}")


class Metadata(http.server.ThreadingHTTPServer):
    """The metadata service, version 2: keys of an instance's role, and its notice. Hosts are known by their address."""

    def __init__(self) -> None:
        super().__init__(("169.254.169.254", 80), _Answers)
        self.roles: dict[str, str] = {}
        self.notices: dict[str, str] = {}  # when an instance ends

    def answer(self, path: str, address: str) -> str | None:
        role, ends = self.roles.get(address), self.notices.get(address)
        if path == "/latest/meta-data/spot/instance-action" and ends:
            return json.dumps({"action": "terminate", "time": ends})
        if path == "/latest/meta-data/iam/security-credentials/" and role:
            return role
        if path == f"/latest/meta-data/iam/security-credentials/{role}":
            keys = {"AccessKeyId": "testing", "SecretAccessKey": "testing", "Token": "testing"}
            return json.dumps({**keys, "Code": "Success", "Expiration": "2099-01-01T00:00:00Z"})
        return None


class _Answers(http.server.BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        is_right = self.path == "/latest/api/token" and self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        self._send(200 if is_right else 400, "token" if is_right else "")

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != "token":
            self._send(401, "")
            return
        found = self.server.answer(self.path, self.client_address[0])
        self._send(404 if found is None else 200, found or "")

    def _send(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # who asked may have gone
            self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        """It says nothing."""


def _answers(ec2: Any) -> bool:
    try:
        return bool(ec2.describe_regions())
    except BotoCoreError:
        return False
