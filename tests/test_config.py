"""The schema of a run: what is refused, how it is said, and what counts as the same run."""

from __future__ import annotations

from pathlib import Path

import pytest

from distssl import config, method, settings
from distssl.config import Run
from distssl.errors import ConfigError
from tests import runs


def load(*overrides: str, file: Path | None = None) -> Run:
    return config.load(file, ["data.source=photos", *overrides], method.options)


def mistakes(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load(*overrides)
    return list(raised.value.messages)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.epoch=3", ["train.epoch: unknown key", "did you mean epochs?"]),
        ("trian.epochs=3", ["trian: unknown key", "did you mean train?"]),
        ("train.zzzzzzzz=3", ["train.zzzzzzzz: unknown key", "known here:", "warmup_epochs"]),
        ("method.temprature=1", ["method.temprature: unknown key", "did you mean temperature?"]),
        ("method.augment.size=3", ["method.augment.size: unknown key", "did you mean size_px?"]),
        ("method.name=simcrl", ["method.name='simcrl'", "did you mean simclr?"]),
        ("method=simclr", ["method='simclr'"]),
        ("train.epochs=ten", ["train.epochs='ten'", "integer"]),
        ("train.epochs=0", ["train.epochs=0", "greater than 0"]),
        ("train.epochs=1.5", ["train.epochs=1.5", "integer"]),
        ("train.lr=-1", ["train.lr=-1", "greater than 0"]),
        ("train.optimizer=adam", ["train.optimizer='adam'", "'sgd', 'adamw' or 'lars'"]),
        ("train.epochs.x=1", ["'train.epochs.x=1'", "epochs"]),
        ("train.epochs", ["'train.epochs'", "key=value is right"]),
        ("=3", ["'=3'", "key=value is right"]),
        ("model.options={width: [8", ["'model.options={width: [8'", "not YAML"]),
        ("name=a/b", ["name='a/b'"]),
        ("name=..", ["name='..'"]),
        ("data.source=", ["data.source"]),
        ("method.augment.blur_sigma=[0, 0]", ["method.augment.blur_sigma=[0, 0]", "two numbers above 0, the lower"]),
        ("method.augment.blur_sigma=[2.0, 0.1]", ["method.augment.blur_sigma=[2.0, 0.1]", "the lower first"]),
        ("method.augment.crop_aspect=[0, 1]", ["method.augment.crop_aspect=[0, 1]", "above 0"]),
        ("method.augment.crop_area=[0.5, .inf]", ["method.augment.crop_area=[0.5, inf]"]),
        ("method.augment.crop_area=[0.5]", ["method.augment.crop_area"]),
        ("eval.fit.window=[0, 0]", ["eval.fit.window=[0, 0]", "above 0"]),
        ("eval.tasks=[knn, segments]", ["eval.tasks", "'linear', 'retrieval'"]),
    ],
)
def test_a_mistake_is_told_in_one_line_with_its_key(override: str, told: list[str]) -> None:
    setup = ["train.epochs=3"] if override.startswith("train.epochs.") else []
    (message,) = mistakes(*setup, override)
    assert "\n" not in message
    for part in told:
        assert part in message


@pytest.mark.parametrize("name", ["swav", "dino", "deepcluster_v2", "moco_v3", "moco_v2"])
def test_every_methods_crops_are_checked(name: str) -> None:
    views = [key for key in ("augment", "local") if key in method.options(name).model_fields]
    told = mistakes(f"method.name={name}", *(f"method.{key}.crop_area=[0.6, 0.3]" for key in views))
    assert [message.partition("=")[0] for message in told] == [f"method.{key}.crop_area" for key in views]


def test_all_mistakes_are_told_at_once() -> None:
    told = mistakes("train.epoch=3", "train.lr=fast", "method.temprature=1", "machine.threads=0", "rubbish")
    assert len(told) == 5
    for key in ("train.epoch:", "train.lr=", "method.temprature:", "machine.threads=", "'rubbish'"):
        assert sum(key in message for message in told) == 1


def test_a_source_has_to_be_said() -> None:
    with pytest.raises(ConfigError, match=r"data: missing|data\.source: missing"):
        config.load(None, [], method.options)


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {source: there}\ntrain: {epochs: 7, lr: 0.5}\n")
    run = config.load(file, ["train.lr=0.25", "eval.labels=[10, null]"], method.options)
    assert (run.data.source, run.train.epochs, run.train.lr) == ("there", 7, 0.25)
    assert run.eval.labels == (10, None)
    assert run.train.momentum == Run(data=config.Data(source="x")).train.momentum


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("a: [", "not YAML"),
        ("- a\n- b\n", "holds list"),
        ("", "holds NoneType"),
        ("name: caf\xe9", "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str | None, told: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=told) as raised:
        config.load(file, [], method.options)
    (message,) = raised.value.messages
    assert message.startswith(f"--config {file}: ")
    assert "\n" not in message


def test_files_that_extend_each_other_are_told(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {other}.yaml\n")
    with pytest.raises(ConfigError, match=r"--cluster .*a\.yaml: extends itself"):
        settings.read_extending(tmp_path / "a.yaml", "--cluster")


def test_what_is_dumped_is_complete_and_comes_back_the_same(tmp_path: Path) -> None:
    run = runs.tiny(Path("photos"), tmp_path, "method.temperature=0.3")
    assert config.parse(config.dump(run), "here") == run
    assert "temperature: 0.3" in config.dump(run)
    assert "momentum: 0.9" in config.dump(run)  # a default, written out
    (tmp_path / "run.yaml").write_text(config.dump(run))
    assert config.load(tmp_path / "run.yaml", [], method.options) == run
    with pytest.raises(ConfigError, match=r"mine/config.yaml: train.epoch: unknown key; did you mean epochs\?"):
        config.parse("train: {epoch: 3}", "mine/config.yaml")


@pytest.mark.parametrize(
    "override",
    ["name=b", "machine.workers=3", "machine.threads=2", "checkpoint.every=7", "train.log_every=3"],
)
def test_what_does_not_decide_the_result_makes_no_other_run(override: str) -> None:
    assert config.differences(load(), load(override)) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.lr=0.5", "train.lr: 0.3 there, 0.5 here"),
        ("seed=1", "seed: 0 there, 1 here"),
        ("method.temperature=0.25", "method.temperature: 0.1 there, 0.25 here"),
        ("data.lanes=32", "data.lanes: None there, 32 here"),
    ],
)
def test_what_decides_the_result_makes_another_run(override: str, line: str) -> None:
    assert config.differences(load("method.temperature=0.1"), load("method.temperature=0.1", override)) == [line]


def test_a_run_folder_is_absolute_and_named_after_the_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("name=mine", "machine.storage=runs").run_dir == tmp_path / "runs" / "mine"
    assert load("data.source=/data/cats.zip").run_name == "simclr_resnet50_cats"
    assert load("data.source=/data/cats/").run_name == "simclr_resnet50_cats"
    assert load("data.source=scattered_digits:test").run_name == "simclr_resnet50_scattered_digits-test"
    assert load("data.source=/data/a-*.tar").run_name == "simclr_resnet50_a-"
