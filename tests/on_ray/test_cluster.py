"""A cluster of which nothing can be known is not brought up, nor said to be gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distssl.errors import RunError
from distssl.on_ray import cluster
from distssl.on_ray.cluster_file import ClusterFile
from tests.cluster.test_files import ROOT, filled


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterFile:
    """Of a cloud that this user has no way to."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(filled(yaml.safe_load((ROOT / "cluster/gcp.yaml").read_text()))))
    return ClusterFile(path)


def test_a_cloud_that_does_not_say_whether_there_is_a_head_starts_none(file: ClusterFile) -> None:
    with pytest.raises(RunError, match=r"whether there is a head is not known: \w+.*; nothing was changed, try again"):
        cluster.is_up(file)


def test_down_that_fails_does_not_say_that_nothing_is_left(file: ClusterFile) -> None:
    with pytest.raises(RunError, match=r"may still be up: it could not be taken down. Ray's words: .*down.log"):
        cluster.down(file, lambda line: None)
