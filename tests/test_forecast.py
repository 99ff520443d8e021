"""`launch.py plan`: what it says of this machine, of a cluster, and of what it cannot know."""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from distssl import calibrate, config, forecast, method, prices
from distssl.calibrate import Calibration
from distssl.config import Run
from distssl.estimate import Collective, Links, Timing
from distssl.forecast import Place
from tests import runs
from tests.conftest import Said

launch = importlib.import_module("launch")


@pytest.fixture
def plan(command: Callable[..., Said]) -> Callable[..., Said]:
    """`launch.py plan ARGUMENTS` in this process."""
    return functools.partial(command, "plan")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("forecast")
    places = [f"data.source={runs.packed(folder, num=48)}", f"machine.storage={folder}", f"machine.cache={folder}"]
    return [*runs.settings(), *places, "train.epochs=2", "data.lanes=4", "eval.test_source=null"]


@pytest.fixture
def given(settings: list[str], tmp_path: Path) -> Path:
    """A calibration of round numbers: 0.01 s an image whatever the batch, and a gradient of 1 MB."""
    of = calibrate._settings(config.load(launch.DEFAULT_CONFIG, settings, method.options))
    timings = tuple(Timing(n, 1, load_s=0.001 * n, compute_s=0.01 * n, step_s=0.01 * n) for n in (4, 8, 16))
    blocking: tuple[Collective, ...] = ()
    links = Links(1e-4, 1e-9)
    made = Calibration("a machine", 4, calibrate.CPU, {1: 4}, of, 1_000_000, blocking, links, 0.0, timings, None)
    calibrate.save(made, tmp_path / "given.json")
    return tmp_path / "given.json"


def cluster(folder: Path, worker: str, **more: object) -> Path:
    nodes = {
        "head": {"node_config": {"InstanceType": "m5.large"}, "resources": {"CPU": 0}},
        "worker": {"node_config": {"InstanceType": worker}, "max_workers": 4},
    }
    tree = {"provider": {"type": "aws", "region": "us-east-1"}, "head_node_type": "head", "available_node_types": nodes}
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(tree | more))
    return file


def rows(out: str) -> list[list[str]]:
    """The cells of the table's rows, which fit the screen."""
    assert max(len(line) for line in out.splitlines() if "│" in line) <= 80
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def test_plan_measures_this_machine_and_keeps_it(
    plan: Callable[..., Said], settings: list[str], tmp_path: Path
) -> None:
    alone = [*settings, "data.lanes=1"]  # of two workers the benchmark tells
    code, out, err = plan(*alone, "--save", tmp_path / "new.json")
    assert code == 0, err
    assert "6 steps of 16 images: 2 epochs of 3 steps" in out
    ((place, workers, images_per_s, hours, *_),) = rows(out)
    assert (place, workers) == ("this machine", "1")
    assert float(hours) == pytest.approx(6 * 16 / float(images_per_s) / 3600, rel=0.02)
    timings = json.loads((tmp_path / "new.json").read_text())["timings"]
    assert {(one["images"], one["beside"]) for one in timings} == {(16, 1)}
    assert plan(*alone, "--calibration", tmp_path / "new.json")[1] == out


def test_plan_prices_every_number_of_workers_that_fits(
    plan: Callable[..., Said], settings: list[str], given: Path, tmp_path: Path
) -> None:
    code, out, err = plan(*settings, "--cluster", cluster(tmp_path, "c6i.2xlarge"), "--calibration", given)
    assert code == 0, err
    told = rows(out)
    assert [row[:2] for row in told] == [["1 worker", "1"], ["2 worker", "2"], ["4 worker", "4"]]  # 3 does not divide 4
    table = prices.table().providers["aws"].instances
    for (_, _, images_per_s, hours, per_hour, usd, limit, _), num in zip(told, (1, 2, 4), strict=True):
        usd_per_hour = table["m5.large"].usd_per_hour + num * table["c6i.2xlarge"].usd_per_hour
        assert float(per_hour) == pytest.approx(usd_per_hour, rel=0.01)
        assert float(hours) == pytest.approx(6 * 16 / float(images_per_s) / 3600, rel=0.02)
        assert float(usd) == pytest.approx(float(hours) * usd_per_hour, rel=0.02)
        assert limit == "compute"
    speeds = [float(row[2]) for row in told]
    assert speeds[0] == pytest.approx(100)
    assert 100 < speeds[1] < 200
    assert 150 < speeds[2] < 400
    assert prices.table().date in out
    assert "check them" in out


def test_plan_goes_no_further_than_the_whole_cluster(
    plan: Callable[..., Said], settings: list[str], given: Path, tmp_path: Path
) -> None:
    file = cluster(tmp_path, "c6i.2xlarge", max_workers=2)
    code, out, err = plan(*settings, "--cluster", file, "--calibration", given)
    assert code == 0, err
    assert [row[:2] for row in rows(out)] == [["1 worker", "1"], ["2 worker", "2"]]


def test_plan_measures_the_batches_of_the_places_asked_about(
    plan: Callable[..., Said],
    settings: list[str],
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a global batch of 16: a rank of it alone where each host has one, and never all of it where none is asked."""
    asked: list[set[tuple[int, int]]] = []

    def measure(run: Run, data: object, batches: set[tuple[int, int]]) -> Calibration:
        asked.append(batches)
        return calibrate.load(given, run)

    monkeypatch.setattr(calibrate, "measure", measure)
    for limits in ({}, {"max_workers": 2}):
        code, _, err = plan(*settings, "--cluster", cluster(tmp_path, "c6i.2xlarge", **limits))
        assert code == 0, err
    assert asked == [{(4, 1), (8, 1), (16, 1)}, {(8, 1), (16, 1)}]
    lanes = ["data.lanes=64", "data.global_batch=64"]
    run = config.load(launch.DEFAULT_CONFIG, [*settings, *lanes], method.options)
    several = [Place("worker", num, 4 * num, 4, None, None, None) for num in range(1, 17) if 64 % (4 * num) == 0]
    assert {images for images, _ in forecast._batches_of(run, several)} == {16, 8, 4, 1}


def test_a_batch_without_memory_on_the_gpu_is_not_foretold(
    plan: Callable[..., Said], settings: list[str], given: Path, tmp_path: Path
) -> None:
    given.write_text(json.dumps(json.loads(given.read_text()) | {"device": "NVIDIA L4", "too_large": 16}))
    code, out, err = plan(*settings, "--cluster", cluster(tmp_path, "g6.xlarge"), "--calibration", given)
    assert code == 0, err
    assert [row[1] for row in rows(out)] == ["2", "4"]
    assert "no memory there for 16 images a worker" in out


def test_plan_invents_no_speed_for_a_gpu_it_has_not_seen(
    plan: Callable[..., Said], settings: list[str], given: Path, tmp_path: Path
) -> None:
    file = cluster(tmp_path, "g6.xlarge")
    for arguments in (["--calibration", given], []):  # without: there is nothing to measure here
        code, out, err = plan(*settings, "--cluster", file, *arguments)
        assert code == 0, err
        assert [(row[2], row[3], row[5]) for row in rows(out)] == [("?", "?", "?")] * 3
        assert float(rows(out)[0][4]) > 0
        assert re.search("plan --save FILE. with this config", out)
    seen = json.loads(given.read_text()) | {"device": "NVIDIA L4"}
    given.write_text(json.dumps(seen))
    assert float(rows(plan(*settings, "--cluster", file, "--calibration", given)[1])[0][2]) == pytest.approx(100)
    given.write_text(json.dumps(seen | {"device": "NVIDIA L40S"}))
    assert rows(plan(*settings, "--cluster", file, "--calibration", given)[1])[0][2] == "?"


@pytest.mark.parametrize("name", ["aws.yaml", "aws-spot.yaml", "gcp.yaml", "onprem.yaml"])
def test_the_cluster_files_that_come_with_it_have_prices_before_they_are_filled_in(
    plan: Callable[..., Said], settings: list[str], given: Path, name: str
) -> None:
    file = launch.DEFAULT_CONFIG.parent.parent / "cluster" / name
    code, out, err = plan(*settings, "--cluster", file, "--calibration", given)
    assert code == 0, err
    assert {row[2] for row in rows(out)} == {"?"}  # all of them have GPUs
    assert ({row[4] for row in rows(out)} == {"?"}) == (name == "onprem.yaml")


def test_a_machine_without_a_price_is_named(
    plan: Callable[..., Said], settings: list[str], given: Path, tmp_path: Path
) -> None:
    code, out, _ = plan(*settings, "--cluster", cluster(tmp_path, "z9.huge"), "--calibration", given)
    assert code == 0
    assert rows(out)[0][4:6] == ["?", "?"]
    assert "worker: cluster/prices.yaml has no price of it or of the head" in out


def test_wrong_input_is_one_line_and_measures_nothing(
    plan: Callable[..., Said], settings: list[str], given: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd.yaml"
    odd.write_text("provider: {type: aws}\n")
    no_host = cluster(tmp_path, "g5.48xlarge", max_workers=0)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("provider: {type: local, head_ip: 192.0.2.1}\ndistssl: {wokers: 2}\n")
    for arguments, said in {
        ("--cluster", tmp_path / "gone.yaml"): "--cluster .*gone.yaml: No such file or directory",
        ("--cluster", odd): "--cluster: no provider or available_node_types",
        ("--cluster", no_host): "--cluster: max_workers=0 leaves no host",
        ("--cluster", wrong): "--cluster: distssl.wokers: unknown key; did you mean workers?",
        ("--calibration", odd): "--calibration .*odd.yaml: not a calibration",
        ("--save", tmp_path / "gone" / "x.json"): "--save .*gone/x.json",
        ("--save", odd, "--calibration", given): "--save .*odd.yaml",
        ("train.epoch=2",): "train.epoch: unknown key",
    }.items():
        code, out, err = plan(*settings, *arguments)
        assert (code, out) == (2, ""), arguments
        assert len(err) == 1, err
        assert re.search(said, err[0]), err


def test_help_of_plan_fits_a_screen(plan: Callable[..., Said]) -> None:
    code, out, _ = plan("--help")
    assert code == 0
    assert len(out.splitlines()) <= 24
