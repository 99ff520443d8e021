"""How many workers a cluster file has room for, counted by hand, and that `plan` speaks of as many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distssl import capacity, forecast
from tests import runs, shipped

THREE_HOSTS = {"head_ip": "192.0.2.1", "worker_ips": ["192.0.2.2", "192.0.2.3"]}
FOUR_GPUS = {"worker_start_ray_commands": ["RAY_AUTH_MODE=token ray start --num-gpus=4 --address=$RAY_HEAD_IP:6379"]}


def of_worker(**changes: Any) -> dict[str, Any]:
    return {"available_node_types": {"worker": changes}}


# name, what lies over it, lanes -> (hosts, workers) of each row of a plan; a g5.12xlarge has four GPUs.
CASES = [
    ("aws", {}, 64, [(1, 4), (2, 8)]),
    ("aws-spot", {}, 64, [(1, 4), (2, 8)]),
    ("aws", {"distssl": {"workers": 2}}, 64, [(1, 2)]),
    ("aws", {"distssl": {"workers": 6}}, 12, [(1, 4), (2, 6)]),
    ("aws", {"distssl": {"workers": 6}}, 64, [(1, 4)]),  # 6 does not divide 64
    ("aws", {"max_workers": 8, **of_worker(max_workers=4)}, 48, [(1, 4), (2, 8), (3, 12), (4, 16)]),
    ("aws", of_worker(max_workers=8), 64, [(1, 4), (2, 8)]),  # of all types together: 2
    ("aws", of_worker(resources={"GPU": 2}), 64, [(1, 2), (2, 4)]),  # Ray believes the file
    ("aws", of_worker(node_config={"InstanceType": "c6i.2xlarge"}), 64, [(1, 1), (2, 2)]),
    ("aws", of_worker(node_config={"InstanceType": "g5.48xlarge"}), 4, [(1, 4)]),  # half a host has room for all
    ("gcp", {}, 64, [(1, 4), (2, 8)]),
    ("gcp", {"distssl": {"workers": 2}}, 64, [(1, 2)]),
    ("gcp", of_worker(resources={"CPU": 48, "GPU": 0}), 64, [(1, 1), (2, 2)]),  # of which Ray does not ask Google
    ("onprem", {"provider": THREE_HOSTS, "distssl": {"workers": 8}}, 64, [(1, 2), (2, 4), (3, 8)]),  # 3 a host
    ("onprem", {"provider": THREE_HOSTS, "distssl": {"workers": 12}}, 12, [(1, 4), (2, 6), (3, 12)]),
    ("onprem", {"provider": THREE_HOSTS, "distssl": {"workers": None}}, 12, [(1, 1), (2, 2), (3, 3)]),
    ("onprem", {"provider": THREE_HOSTS, "distssl": {"workers": None}, **FOUR_GPUS}, 12, [(1, 4), (2, 6), (3, 12)]),
    ("onprem", {"provider": THREE_HOSTS, "distssl": {"workers": 8}, **FOUR_GPUS}, 64, [(1, 4), (2, 8)]),
    ("local", {}, 64, [(1, 2)]),
    ("local", {"distssl": {"workers": 5}}, 64, [(1, 4)]),
]


@pytest.mark.parametrize(("name", "above", "lanes", "expected"), CASES)
def test_plan_has_on_each_number_of_hosts_the_workers_that_a_run_would_have(
    tmp_path: Path, name: str, above: dict[str, Any], lanes: int, expected: list[tuple[int, int]]
) -> None:
    run = runs.tiny(tmp_path, tmp_path, f"data.global_batch={lanes}", f"data.lanes={lanes}")
    places = forecast._on_cluster(run, shipped.tree(name, **above))
    assert [(place.num_nodes, place.world_size) for place in places] == expected


def test_workers_beside_each_other_are_those_of_the_fullest_host(tmp_path: Path) -> None:
    run = runs.tiny(tmp_path, tmp_path, "data.global_batch=64", "data.lanes=64")
    tree = shipped.tree("onprem", provider=THREE_HOSTS, distssl={"workers": 8})
    assert [place.beside for place in forecast._on_cluster(run, tree)] == [2, 3, 3]
    assert [place.beside for place in forecast._on_cluster(run, shipped.tree("local"))] == [2]
    assert [place.links is None for place in forecast._on_cluster(run, tree)] == [True, False, False]


def test_workers_are_of_the_type_with_most_gpus() -> None:
    tree = shipped.tree("aws", max_workers=9)
    kinds = {
        name: {"max_workers": num, "node_config": {"InstanceType": kind}}
        for name, num, kind in (("cpus", 9, "c6i.2xlarge"), ("one", 8, "g5.xlarge"), ("eight", 3, "g5.48xlarge"))
    }
    tree["available_node_types"] = {"head": tree["available_node_types"]["head"], **kinds}
    found = capacity.of(tree, capacity.Options(), capacity.listed(tree))
    assert found == capacity.Capacity("eight", num_hosts=3, per_host=8, most=24, on_gpus=True)


@pytest.mark.parametrize(
    ("worker", "gpus", "on_gpus"),
    [(None, 0, False), (None, 4, True), ({"CPU": 8, "GPU": 1}, 0, True), ({"CPU": 8, "GPU": 0}, 4, False)],
)
def test_a_worker_takes_a_gpu_where_the_file_or_else_the_host_says_so(
    worker: dict[str, int] | None, gpus: int, on_gpus: bool
) -> None:
    said = capacity.Options.model_validate({"worker": worker})
    assert capacity.of(shipped.tree("onprem"), said, {"local": {"GPU": gpus}}).on_gpus == on_gpus


def test_what_is_not_filled_in_is_not_said() -> None:
    said = capacity.options({"distssl": {"workers": "FILL_IN_NUMBER", "storage": "s3://FILL_IN_BUCKET/runs"}}, "x.yaml")
    assert said == capacity.Options()
