"""Prices by the hour of the nodes in a cluster file."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from distssl import prices

AWS = prices.table().providers["aws"].instances
GCP = prices.table().providers["gcp"]


def aws(**types: dict[str, Any]) -> dict[str, Any]:
    """A cluster file of these node configs."""
    nodes = {name: {"node_config": config} for name, config in types.items()}
    return {"provider": {"type": "aws", "region": "us-west-2"}, "available_node_types": nodes}


def gcp(**types: dict[str, Any]) -> dict[str, Any]:
    return aws(**types) | {"provider": {"type": "gcp", "region": "us-central1"}}


def test_spot_instances_have_the_spot_price() -> None:
    cluster = aws(
        head={"InstanceType": "m6i.large"},
        sure={"InstanceType": "g5.xlarge"},
        spot={"InstanceType": "g5.xlarge", "InstanceMarketOptions": {"MarketType": "spot"}},
    )
    g5 = AWS["g5.xlarge"]
    expected = {"head": AWS["m6i.large"].usd_per_hour, "sure": g5.usd_per_hour, "spot": g5.spot_usd_per_hour}
    assert prices.hourly(cluster) == expected


@pytest.mark.parametrize(
    ("scheduling", "is_spot"),
    [
        ([{"preemptible": True}], True),
        ([{"preemptible": False}], False),
        ({"provisioningModel": "SPOT"}, True),
        ([], False),
    ],
)
def test_machines_of_gcp_may_be_preemptible(scheduling: Any, is_spot: bool) -> None:
    machine = GCP.instances["g2-standard-8"]
    cluster = gcp(worker={"machineType": "zones/us-central1-a/machineTypes/g2-standard-8", "scheduling": scheduling})
    assert prices.hourly(cluster) == {"worker": machine.spot_usd_per_hour if is_spot else machine.usd_per_hour}


def test_attached_gpus_are_in_the_price_and_built_in_ones_already_are() -> None:
    t4 = GCP.accelerators["nvidia-tesla-t4"]
    two = [{"acceleratorType": "projects/p/zones/z/acceleratorTypes/nvidia-tesla-t4", "acceleratorCount": 2}]
    unknown = [{"acceleratorType": "tpu-v9", "acceleratorCount": 1}]
    cluster = gcp(
        attached={"machineType": "n1-standard-8", "guestAccelerators": two},
        built_in={"machineType": "a2-highgpu-1g", "guestAccelerators": unknown},
        strange={"machineType": "n1-standard-8", "guestAccelerators": unknown},
    )
    nodes = prices.nodes(cluster)
    n1 = GCP.instances["n1-standard-8"]
    assert nodes["attached"].usd_per_hour == pytest.approx(n1.usd_per_hour + 2 * t4.usd_per_hour)
    assert nodes["attached"].instance is not None
    assert (nodes["attached"].instance.gpus, nodes["attached"].instance.gpu) == (2, "T4")
    assert nodes["built_in"].usd_per_hour == GCP.instances["a2-highgpu-1g"].usd_per_hour
    assert nodes["strange"].usd_per_hour is None


def test_the_bill_adds_nodes_and_names_those_without_a_price() -> None:
    cluster = aws(
        head={"InstanceType": "m5.large"}, big={"InstanceType": "g5.12xlarge"}, odd={"InstanceType": "z9.huge"}
    )
    assert prices.hourly(cluster)["odd"] is None
    bill = prices.bill(cluster, {"head": 1, "big": 3, "odd": 2, "gone": 1})
    assert bill.usd_per_hour == pytest.approx(AWS["m5.large"].usd_per_hour + 3 * AWS["g5.12xlarge"].usd_per_hour)
    assert bill.unknown == ("odd", "gone")
    assert prices.bill(cluster, {"head": 0, "odd": 0}) == prices.Bill(0, ())


def test_a_cluster_of_ones_own_has_no_prices() -> None:
    cluster = aws(worker={}) | {"provider": {"type": "local"}}
    assert prices.hourly(cluster) == {"worker": None}
    assert not prices.in_region(cluster)
    assert prices.hourly({"provider": {"type": "local", "head_ip": "10.0.0.1"}}) == {}


def test_the_table_has_one_date_and_spot_is_cheaper() -> None:
    table = prices.table()
    datetime.date.fromisoformat(table.date)
    for provider in table.providers.values():
        assert provider.regions
        for name, one in provider.instances.items():
            assert 0.1 * one.usd_per_hour < one.spot_usd_per_hour < one.usd_per_hour, name
            assert (one.gpu is None) == (one.gpus == 0), name
