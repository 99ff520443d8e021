"""What hosts of a cloud do not see is refused by its key, before the cloud is asked for anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from distssl.errors import ConfigError
from distssl.on_ray import cluster, visible
from tests import runs
from tests.conftest import Said
from tests.on_ray.test_cluster_file import minimal, opened


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's, with images and a run of theirs."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    return tmp_path


def refused(tree: dict[str, Any], folder: Path, named: dict[str, str]) -> list[str]:
    """The keys."""
    try:
        visible.places(opened(tree, folder), named)
    except ConfigError as error:
        return [message.partition("=")[0] for message in error.messages]
    return []


def test_paths_of_this_machine_are_refused_and_urls_and_names_are_not(folder: Path) -> None:
    seen = {
        "data.source": "s3://bucket/shards",
        "data.labelled": "stl10:unlabeled",
        "eval.source": "scattered_digits",
        "machine.storage": "s3://bucket/runs",
    }
    assert refused(minimal(), folder, seen) == []
    unseen = {
        "data.source": "photos",  # is here
        "eval.source": "/data/photos.csv",  # is nowhere
        "eval.test_source": f"file://{folder}/photos",
        "machine.storage": str(folder / "runs"),
        "model.init": "export.safetensors",
        "RUN": "runs/mine",
    }
    assert refused(minimal(), folder, unseen) == list(unseen)


@pytest.mark.parametrize(
    "more",
    [
        {"file_mounts": {"/mnt/data": "."}},
        {
            "setup_commands": [
                "sudo mkdir -p /mnt/data",
                "sudo mount -t nfs4 fs-1.efs.us-east-1.amazonaws.com:/ /mnt/data",
            ]
        },
        {"docker": {"image": "ray", "container_name": "ray", "run_options": ["-v /mnt/data:/mnt/data:ro"]}},
    ],
)
def test_a_path_that_the_cluster_file_speaks_of_is_right(folder: Path, more: dict[str, Any]) -> None:
    tree = minimal() | more
    assert refused(tree, folder, {"data.source": "/mnt/data/photos", "machine.storage": "/mnt/data"}) == []
    assert refused(tree, folder, {"data.source": "/mnt/database"}) == ["data.source"]


def test_on_hosts_of_ones_own_a_path_counts_from_the_root(folder: Path) -> None:
    tree = {key: value for key, value in minimal().items() if key.endswith("commands")}
    tree |= {"cluster_name": "mine", "auth": {"ssh_user": "me"}}
    file = opened(tree | {"provider": {"type": "local", "head_ip": "192.0.2.1", "worker_ips": []}}, folder)
    named = {"data.source": "photos", "eval.source": "cifar10", "eval.test_source": "s3://bucket/test"}
    assert visible.places(file, named) == {**named, "data.source": str(folder / "photos")}
    config = runs.tiny(Path("photos"), folder, "eval.source=photos").model_dump(mode="json")
    visible.settle(file, config)
    assert config["data"]["source"] == config["eval"]["source"] == str(folder / "photos")
    assert config["eval"]["test_source"] is None


def test_commands_refuse_it_before_a_cloud_is_asked(
    folder: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "check", lambda file: pytest.fail("it asks the cloud"))
    opened(minimal() | {"distssl": {"storage": "s3://bucket/runs"}}, folder)
    sweep = {"name": "s", "runs": ["runs/mine"], "space": {"eval.inverse_l2": {"uniform": [0.1, 1.0]}}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep | {"overrides": ["eval.source=photos"]}))
    there = ("--cluster", folder / "cluster.yaml")
    for said, key in (
        (command("data.source=photos", *there), "data.source=photos"),
        (command("--storage", "out", *there), f"machine.storage={folder}/out"),
        (command("evaluate", "runs/mine", *there), "RUN=runs/mine"),
        (command("evaluate", "s3://bucket/runs/mine", "eval.test_source=photos", *there), "eval.test_source=photos"),
        (command("sweep", "--config", "sweep.yaml", *there), "runs[0]=runs/mine"),
    ):
        code, _, errors = said
        assert code == 2, errors
        assert errors[0].startswith(f"error: {key}: hosts of mine do not see this machine's folders; a URL")
    assert errors[1].startswith("error: eval.source=photos: ")
