"""The calibration: what it counts is what the method's layers say, and a file of it is of one run alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.nn.modules.batchnorm import _BatchNorm

from distssl import calibrate, collectives, method, verify
from distssl.calibrate import Calibration, Data
from distssl.config import Run
from distssl.errors import ConfigError
from tests import runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("calibrate")
    return runs.tiny(runs.packed(folder, num=48), folder)


@pytest.fixture(scope="module")
def measured(run: Run) -> Calibration:
    return calibrate.measure(run, Data(Path(run.data.source)), [(16, 1), (8, 1)], part_s=1.0)


def test_each_batch_size_is_timed(measured: Calibration) -> None:
    assert [(timing.images, timing.beside) for timing in measured.timings] == [(8, 1), (16, 1)]
    for timing in measured.timings:
        assert min(timing.load_s, timing.compute_s, timing.step_s) > 0
        assert timing.step_s > 0.5 * timing.compute_s


def test_a_step_waits_for_each_batch_norm_both_ways(run: Run, measured: Calibration) -> None:
    built = method.build(run)
    widths = sorted(layer.num_features for layer in built.modules() if isinstance(layer, _BatchNorm))
    assert widths
    backward = sorted(one.num_bytes for one in measured.blocking if one.kind == "all_reduce")
    assert backward == [4 * 2 * width for width in widths]  # two sums a channel
    forward = [one.num_bytes for one in measured.blocking if one.kind == "all_gather"]
    assert all(forward.count(4 * (2 * width + 1)) >= widths.count(width) for width in widths)  # mean, variance, count
    learnt = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    assert measured.gradient_bytes == 4 * learnt


def test_a_batch_without_memory_is_the_end_of_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has memory for fewer than 16 images a worker, then for none; of a dataset of hardly more."""
    run = runs.tiny(runs.packed(tmp_path, num=10), tmp_path, "data.global_batch=8")
    data, attempt, least = Data(Path(run.data.source)), collectives.attempt, 16

    def within(function: Callable[..., object], world_size: int, *args: object) -> list[object]:
        if function is calibrate._measure and args[2] >= least:  # type: ignore[operator]
            raise collectives.NoMemoryError("CUDA out of memory")
        return attempt(function, world_size, *args)

    monkeypatch.setattr(collectives, "attempt", within)
    made = calibrate.measure(run, data, [(16, 1), (8, 1)], part_s=0.1)
    assert ([timing.images for timing in made.timings], made.too_large) == ([8], 16)
    least = 0
    with pytest.raises(ConfigError, match=r"^data.global_batch=8: no memory here for 8 images a worker"):
        calibrate.measure(run, data, [(16, 1), (8, 1)], part_s=0.1)


@pytest.mark.parametrize("name", [name for name in method.names() if not method.find(name).embeds])
def test_a_rank_without_others_takes_the_steps_of_every_method(tmp_path: Path, name: str) -> None:
    packed = verify.pack(tmp_path)
    run = runs.tiny(packed, tmp_path, f"method.name={name}")
    labelled = packed if method.find(name).learns_from_labels else None
    with calibrate._one_of(2), calibrate._training(run, 8, Data(packed, labelled), 2) as training:
        training.model = training.method
        assert collectives.world_size() == 2
        batches = training.batches()
        training.take_step(batches)
        assert len(next(batches)["id"]) == 8
    assert collectives.world_size() == 1


def test_what_is_saved_is_loaded(run: Run, measured: Calibration, tmp_path: Path) -> None:
    calibrate.save(measured, tmp_path / "calibration.json")
    assert calibrate.load(tmp_path / "calibration.json", run) == measured


def test_a_calibration_of_other_steps_is_refused(run: Run, measured: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    calibrate.save(measured, file)
    wider = run.model_copy(update={"model": run.model.model_copy(update={"backbone": "resnet18"})})
    with pytest.raises(ConfigError) as caught:
        calibrate.load(file, wider)
    assert f"--calibration {file}: model.backbone='resnet10' there, 'resnet18' here" in caught.value.messages
    longer = run.model_copy(update={"train": run.train.model_copy(update={"epochs": 999})})
    assert calibrate.load(file, longer) == measured


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 0}', "\0"])
def test_what_is_no_calibration_is_named(run: Run, tmp_path: Path, text: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"--calibration .*calibration.json: .*--save"):
        calibrate.load(file, run)
    with pytest.raises(ConfigError, match="No such file or directory; a file that --save wrote is right"):
        calibrate.load(tmp_path / "gone.json", run)


def test_a_calibration_of_another_version_is_told(run: Run, measured: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    calibrate.save(measured, file)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": calibrate.VERSION + 1}))
    with pytest.raises(ConfigError, match="of another version of distssl; measure again with --save"):
        calibrate.load(file, run)


def test_a_half_written_calibration_is_named(run: Run, measured: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    calibrate.save(measured, file)
    tree = json.loads(file.read_text())
    for key in tree:
        file.write_text(json.dumps({name: value for name, value in tree.items() if name != key}))
        with pytest.raises(ConfigError, match="not a calibration"):
            calibrate.load(file, run)
