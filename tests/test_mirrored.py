"""Checkpoints at a URL: whole or not there, whoever dies when, and the same for ranks that share no folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distssl import checkpoint, mirrored
from distssl.context import Context
from distssl.errors import ConfigError
from distssl.mirror import Mirror
from tests import buckets
from tests.buckets import Unreliable
from tests.conftest import Ranks


def state(step: int, run: str = "mine") -> dict[str, Any]:
    return {"step": step, "run": run, "w": torch.full((3,), float(step))}


def mirror_of(folder: Path, bucket: str) -> Mirror:
    folder.mkdir(parents=True, exist_ok=True)
    return Mirror(folder, f"{bucket}/runs/demo")


@pytest.fixture
def copies(bucket: str, tmp_path: Path) -> Mirror:
    return mirror_of(tmp_path / "host", bucket)


def commit(copies: Mirror, *steps: int, keep_last: int = 9, **metrics: float) -> None:
    for step in steps:
        mirrored.commit(copies.folder, copies, step, state(step), {"loss": 1 / step, **metrics}, keep_last, None)


def newest(copies: Mirror) -> dict[str, Any] | None:
    with Context(copies.folder) as context:
        context.mirror = copies
        return mirrored.newest(context, copies.folder)


def steps_there(copies: Mirror) -> list[int]:
    names = copies.remote.names("checkpoints")
    return sorted({checkpoint.step_of(name) for name in names})


def steps_here(copies: Mirror) -> list[int]:
    return sorted(checkpoint.step_of(path.name) for path in checkpoint.folder(copies.folder).glob("step_*"))


def test_what_is_committed_is_at_the_store_and_a_fresh_host_goes_on_from_it(
    copies: Mirror, bucket: str, tmp_path: Path
) -> None:
    assert newest(copies) is None
    commit(copies, 2, 4)
    found = newest(mirror_of(tmp_path / "fresh", bucket))
    assert found is not None
    assert torch.equal(found["w"], state(4)["w"])


def test_a_checkpoint_is_put_there_state_first_and_manifest_last(unreliable: Unreliable, copies: Mirror) -> None:
    (copies.folder / "metrics.jsonl").write_text('{"step": 4}\n')
    commit(copies, 4)
    put = [path.rpartition("demo/")[2] for method, path in unreliable.seen if method == "PUT"]
    step = "checkpoints/step_00000004"
    assert put == [f"{step}/state.pt", "metrics.jsonl", f"{step}/manifest.json"]


def test_the_same_are_kept_at_the_store_as_here(copies: Mirror, bucket: str, tmp_path: Path) -> None:
    knn = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.3, 5: 0.2}
    for step, value in knn.items():
        mirrored.commit(copies.folder, copies, step, state(step), {"knn": value}, 2, "knn", {1})
    assert steps_there(copies) == steps_here(copies) == [1, 2, 4, 5]
    fresh = mirror_of(tmp_path / "fresh", bucket)  # has the newest alone, and yet what is best stays at the store
    assert newest(fresh) is not None
    assert steps_here(fresh) == [5]
    mirrored.commit(fresh.folder, fresh, 6, state(6), {"knn": 0.1}, 2, "knn")
    assert steps_there(copies) == [2, 5, 6]


@pytest.mark.parametrize("lost", [checkpoint.MANIFEST, checkpoint.STATE])
def test_one_that_a_crash_cut_short_is_passed_over_and_cleared_away(copies: Mirror, lost: str) -> None:
    commit(copies, 2, 4)
    copies.remote.remove(f"checkpoints/step_00000004/{lost}")
    shutil.rmtree(copies.folder)
    found = newest(copies)
    assert found is not None
    assert found["step"] == 2
    assert steps_here(copies) == [2]
    commit(copies, 6, keep_last=1)
    assert copies.remote.names("checkpoints") == [
        f"checkpoints/step_00000006/{name}" for name in (checkpoint.MANIFEST, checkpoint.STATE)
    ]


def test_damage_at_the_store_is_named_and_never_starts_again_from_nothing(copies: Mirror) -> None:
    commit(copies, 2, 4)
    shutil.rmtree(copies.folder)  # what is whole here counts
    copies.remote.write("checkpoints/step_00000004/state.pt", b"cut")
    found = newest(copies)
    assert found is not None
    assert found["step"] == 2
    copies.remote.write("checkpoints/step_00000002/state.pt", b"cut")
    shutil.rmtree(copies.folder)
    with pytest.raises(ConfigError, match="no checkpoint there is whole: remove s3://") as raised:
        newest(copies)
    assert len(raised.value.messages) == 3


def test_what_an_earlier_start_left_on_the_host_does_not_count(copies: Mirror) -> None:
    commit(copies, 2)
    checkpoint.write(copies.folder, 9, state(9, "another"), {})
    shutil.rmtree(checkpoint.folder(copies.folder) / "step_00000002")
    checkpoint.write(copies.folder, 2, state(2, "another"), {})
    found = newest(copies)
    assert found is not None
    assert (found["step"], found["run"]) == (2, "mine")
    assert steps_here(copies) == [2]
    copies.remote.remove(*copies.remote.names())
    assert newest(copies) is None
    assert steps_here(copies) == []


def test_a_damaged_copy_here_of_a_whole_one_there_is_taken_anew(copies: Mirror) -> None:
    commit(copies, 2)
    (checkpoint.folder(copies.folder) / "step_00000002" / checkpoint.STATE).write_bytes(b"cut")
    found = newest(copies)
    assert found is not None
    assert found["step"] == 2


def test_one_that_is_whole_here_is_not_fetched_again(unreliable: Unreliable, copies: Mirror) -> None:
    commit(copies, 2)
    unreliable.seen.clear()
    assert newest(copies) is not None
    assert not any(method == "GET" and path.endswith(checkpoint.STATE) for method, path in unreliable.seen)


def test_later_figures_are_added_to_one_that_is_still_there(copies: Mirror) -> None:
    commit(copies, 2, 4, keep_last=1)
    for step in (2, 4):
        mirrored.add_metrics(copies.folder, copies, step, {"knn": 0.5})
    assert steps_there(copies) == [4]
    for found in (
        copies.remote.read("checkpoints/step_00000004/manifest.json") or b"",
        (copies.folder / "checkpoints/step_00000004/manifest.json").read_bytes(),
    ):
        assert json.loads(found)["metrics"] == {"loss": 0.25, "knn": 0.5}


def newest_of_a_host(
    folder: Path, bucket: str | None, environment: dict[str, str] | None = None
) -> tuple[Any, str, bool]:
    buckets.learn(environment or {})
    host = folder / f"host{torch.distributed.get_rank() // 2}"
    with Context(host) as context:
        if bucket:
            context.mirror = mirror_of(host, bucket)
        found = mirrored.newest(context, host)
        return found and (found["step"], found["run"]), context.node, context.first_of_node


def test_ranks_on_two_hosts_go_on_from_the_same_checkpoint(
    ranks: Callable[[int], Ranks], copies: Mirror, bucket: str, tmp_path: Path
) -> None:
    commit(copies, 2, 4)
    checkpoint.write(tmp_path / "host1", 7, state(7, "another"), {})
    found = ranks(4).run(newest_of_a_host, tmp_path, bucket, buckets.told())
    assert [of_rank[0] for of_rank in found] == [(4, "mine")] * 4
    nodes = [of_rank[1] for of_rank in found]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]
    assert [of_rank[2] for of_rank in found] == [True, False, True, False]


def test_without_a_url_hosts_take_that_of_rank_0(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "host0", 3, state(3), {})
    checkpoint.write(tmp_path / "host1", 7, state(7, "another"), {})
    assert [of_rank[0] for of_rank in ranks(4).run(newest_of_a_host, tmp_path, None)] == [(3, "mine")] * 4


def test_a_mistake_of_one_rank_is_told_by_all(
    ranks: Callable[[int], Ranks], copies: Mirror, bucket: str, tmp_path: Path
) -> None:
    commit(copies, 2)
    copies.remote.write("checkpoints/step_00000002/state.pt", b"cut")
    assert ranks(4).run(mistake_of_newest, tmp_path, bucket, buckets.told()) == [2] * 4  # lines


def mistake_of_newest(folder: Path, bucket: str, environment: dict[str, str]) -> int:
    with pytest.raises(ConfigError, match="no checkpoint there is whole") as raised:
        newest_of_a_host(folder, bucket, environment)
    return len(raised.value.messages)
