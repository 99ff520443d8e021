"""The command line: what it says to bad input, and that bad input costs nothing that was on disk."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from distssl import checkpoint, config, method, monitor
from distssl.data.shards import Dataset
from distssl.downstream.rows import BACKBONES, read_summary
from tests import disks, runs
from tests.conftest import Said

ROOT = Path(__file__).parent.parent
launch = importlib.import_module("launch")

Command = Callable[..., Said]


def settings(source: object, folder: Path, *overrides: str) -> list[str]:
    """A tiny run called `mine`, in this process, with everything below `folder`."""
    places = [f"data.source={source}", f"machine.storage={folder / 'runs'}", f"machine.cache={folder / 'cache'}"]
    return [*runs.settings(), "train.epochs=1", "eval.test_source=null", *places, "name=mine", *overrides]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.photos(tmp_path_factory.mktemp("photos") / "images", num=48)


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `mine`, done by the command line."""
    folder = tmp_path_factory.mktemp("finished")
    done = launch_here("pretrain", *settings(photos, folder, "checkpoint.every=1", "eval.tasks=[knn]"))
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    assert "run folder:" in done.stdout
    return folder


@pytest.fixture
def mine(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder to spoil. Its run is tmp_path / 'runs' / 'mine'."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs" / "mine"


def launch_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same as a process of its own."""
    line = [sys.executable, "launch.py", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def on_disk(folder: Path) -> dict[str, str]:
    """{path: sha256} of every file but locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_refused(said: Said, *told: str, lines: int = 1) -> None:
    """Exit code 2 and so many lines, each an error, that say `told`."""
    code, _, err = said
    assert code == 2, err
    assert len(err) == lines, err
    assert all(line.startswith("error: ") for line in err)
    for part in told:
        assert any(part in line for line in err), (part, err)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.epoch=3"], ["train.epoch: unknown key; did you mean epochs?"]),
        (["method.temprature=1"], ["method.temprature: unknown key; did you mean temperature?"]),
        (["method.name=simcrl"], ["method.name='simcrl'", "did you mean simclr?"]),
        (["train.lr=fast"], ["train.lr='fast'", "number"]),
        (["data.global_batch=30", "data.lanes=4"], ["data.lanes=4", "data.global_batch=30", "nearest: 3 or 5"]),
        (["data.global_batch=4096"], ["data.global_batch=4096", "48 samples"]),
        (["data.lanes=4", "machine.workers=3"], ["workers=3", "data.lanes=4", "nearest: 2 or 4"]),
        (["machine.workers=-1"], ["machine.workers=-1"]),
        (["train.accumulate=50"], ["train.accumulate=50"]),
        (["model.backbone=resnet81", "model.stem=7x7_s2_pool"], ["model.backbone=resnet81", "nearest: resnet"]),
        (["model.options={wdith: 8}"], ["model.options.wdith", "width"]),
    ],
)
def test_a_wrong_config_is_told_before_a_step_is_made(
    command: Command, photos: Path, tmp_path: Path, overrides: list[str], told: list[str]
) -> None:
    before = on_disk(photos)
    check_refused(command("pretrain", *settings(photos, tmp_path, *overrides)), *told)
    assert on_disk(photos) == before
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_all_mistakes_are_told_at_once(command: Command, photos: Path, tmp_path: Path) -> None:
    wrong = ["train.epochs=1.5", "seed=-1", "modle.stem=x", "method.tau=1", "rubbish"]
    said = command("pretrain", *settings(photos, tmp_path, *wrong))
    check_refused(said, "train.epochs=1.5", "seed=-1", "modle: unknown", "method.tau: unknown", "'rubbish'", lines=5)
    assert on_disk(tmp_path) == {}


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def without_images(folder: Path) -> Path:
    (empty(folder) / "notes.txt").write_text("none here")
    return folder


def empty_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w"):
        return folder.with_suffix(".zip")


def csv_of_nothing(folder: Path) -> Path:
    folder.with_suffix(".csv").write_text("path,label\ngone.jpg,a\n")
    return folder.with_suffix(".csv")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (empty, "holds no image"),
        (without_images, "holds no image"),
        (empty_zip, "holds no image"),
        (csv_of_nothing, "none of its 1 paths exists"),
        (lambda folder: folder, "does not exist"),
        (lambda folder: f"{folder}-*.tar", "data.source="),
        (lambda folder: "cifra10", "cifar10"),
        (lambda folder: "scattered_digits:valid", "scattered_digits:test"),
    ],
)
@pytest.mark.parametrize("name", ["pretrain", "pack"])
def test_a_source_without_images_is_told(
    command: Command, tmp_path: Path, make: Callable[[Path], object], told: str, name: str
) -> None:
    source = make(tmp_path / "source")
    before = on_disk(tmp_path)
    if name == "pack":
        if str(source).endswith(".tar"):
            pytest.skip("tars are indexed, not packed")
        said = command("pack", source, tmp_path / "out")
    else:
        said = command("pretrain", *settings(source, tmp_path))
    check_refused(said, str(source), told)
    after = on_disk(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert not any(path.endswith((".tar", ".parquet")) for path in after)


def test_a_dataset_that_cannot_be_downloaded_is_told(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    check_refused(command("pack", "cifar10", tmp_path / "out"), "cifar10: could not be downloaded", "network")


@pytest.mark.parametrize("right", [["data.source={photos}"], ["data.global_batch=16", "data.source={photos}"]])
def test_a_mistake_once_mended_does_not_stand_in_the_way(
    command: Command, photos: Path, tmp_path: Path, right: list[str]
) -> None:
    wrong = ["data.source=nowhere"] if len(right) == 1 else ["data.global_batch=4096"]
    assert command("pretrain", *settings(photos, tmp_path, *wrong))[0] == 2
    code, _, err = command("pretrain", *settings(photos, tmp_path, "eval.tasks=[]"))
    assert code == 0, err


def test_a_run_folder_of_another_config_is_left_as_it_is(command: Command, mine: Path, photos: Path) -> None:
    before = on_disk(mine.parents[1])
    said = command("pretrain", *settings(photos, mine.parents[1], "eval.tasks=[knn]", "train.lr=0.1", "seed=4"))
    check_refused(said, "train.lr: 0.05 there, 0.1 here", "seed: 3 there, 4 here", "name=ANOTHER", lines=3)
    assert on_disk(mine.parents[1]) == before


def test_a_finished_run_is_shown_again(command: Command, mine: Path, photos: Path) -> None:
    losses = (mine / monitor.METRICS).read_bytes()
    code, out, err = command("pretrain", *settings(photos, mine.parents[1], "eval.tasks=[knn]", "checkpoint.every=1"))
    assert (code, "accuracy" in out) == (0, True), err
    assert (mine / monitor.METRICS).read_bytes() == losses


def cut_short(run_dir: Path, num: int) -> None:
    for path in sorted(checkpoint.folder(run_dir).glob("step_*"))[-num:]:
        state = path / checkpoint.STATE
        state.write_bytes(state.read_bytes()[:2000])


@pytest.mark.parametrize("name", ["pretrain", "evaluate"])
def test_checkpoints_that_are_all_cut_short_are_told_and_left(
    command: Command, mine: Path, photos: Path, name: str
) -> None:
    num = len(list(checkpoint.folder(mine).iterdir()))
    cut_short(mine, num)
    before = on_disk(checkpoint.folder(mine)) | {"losses": (mine / monitor.METRICS).read_text()}
    if name == "pretrain":
        said = command(name, *settings(photos, mine.parents[1], "eval.tasks=[knn]", "checkpoint.every=1"))
    else:
        said = command(name, mine, "--task", "knn")
    check_refused(said, "state.pt has 2000 bytes, its manifest says", "to start again", lines=num + 1)
    assert on_disk(checkpoint.folder(mine)) | {"losses": (mine / monitor.METRICS).read_text()} == before


def test_one_checkpoint_cut_short_costs_the_steps_since_the_one_before(
    command: Command, mine: Path, photos: Path
) -> None:
    expected = [row["loss"] for row in monitor.read_jsonl(mine / monitor.METRICS) if "loss" in row]
    cut_short(mine, 1)
    code, _, err = command("pretrain", *settings(photos, mine.parents[1], "eval.tasks=[knn]", "checkpoint.every=1"))
    assert code == 0, err
    rows = [row for row in monitor.read_jsonl(mine / monitor.METRICS) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(expected) + 1))
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-5)


def test_a_full_disk_stops_the_run_and_what_was_there_stays(photos: Path, tmp_path: Path) -> None:
    with disks.small(tmp_path / "disk", megabytes=6) as disk:
        others = disk / "runs" / "another"
        others.mkdir(parents=True)
        (others / "model.pt").write_bytes(b"precious" * 1000)
        before = on_disk(others)
        small = settings(photos, tmp_path, f"machine.storage={disk / 'runs'}", "model.options={width: 48}")
        done = launch_here("pretrain", *small, "checkpoint.every=1", "eval.tasks=[]")
        assert done.returncode == 2, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert str(disk) in line
        assert "No space left" in line
        assert "Traceback" not in done.stderr
        assert on_disk(others) == before
        assert not list(checkpoint.folder(disk / "runs" / "mine").iterdir())


def test_packing_onto_a_disk_that_is_too_small_is_told(command: Command, photos: Path, tmp_path: Path) -> None:
    with disks.small(tmp_path / "disk", megabytes=1) as disk:
        (disk / "mine").write_bytes(bytes(990 << 10))
        before = on_disk(disk)
        check_refused(command("pack", photos, disk / "out"), str(disk), "not enough disk space")
        after = on_disk(disk)
        assert {path: after.get(path) for path in before} == before


@pytest.mark.parametrize(
    ("text", "told"), [(None, "No such file"), ("train: [", "not YAML"), ("- a\n", "holds list"), ("", "holds None")]
)
def test_a_config_file_that_is_none_is_told(command: Command, tmp_path: Path, text: str | None, told: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    check_refused(command("pretrain", "--config", file), f"--config {file}", told)


def test_evaluate_refuses_what_is_no_run_or_no_task(command: Command, mine: Path, tmp_path: Path) -> None:
    check_refused(command("evaluate", tmp_path / "none"), f"{tmp_path / 'none'}: no run there")
    check_refused(command("evaluate", tmp_path), "no run there")
    check_refused(command("evaluate", mine, "--task", "segments"), "--task segments", "keypoints or all is right")
    check_refused(command("evaluate", mine, "--task", "segment"), "has no labels; say eval.source=")
    check_refused(command("evaluate", mine, "eval.neighbors=5"), "did you mean neighbours?")
    shutil.rmtree(checkpoint.folder(mine))
    check_refused(command("evaluate", mine), "no checkpoint yet")


@pytest.mark.parametrize("option", ["--detach", "--down-when-done"])
def test_what_is_of_a_cluster_is_refused_without_one(command: Command, option: str) -> None:
    check_refused(command("pretrain", option), f"{option}: needs --cluster")


def test_a_cluster_has_one_name(command: Command) -> None:
    check_refused(command("status", "--cluster", "a.yaml", "--address", "http://b"), "one of them is right")
    check_refused(command("status"), "say which cluster, for example --cluster cluster/aws.yaml")


@pytest.mark.parametrize("arguments", [["pretrain", "--wrokers", "2"], ["pack"], ["evaluate", "x", "y=1", "--tsk=knn"]])
def test_wrong_usage_shows_no_traceback(command: Command, arguments: list[str]) -> None:
    code, _, err = command(*arguments)
    assert code == 2
    assert sum("Error" in line for line in err) == 1
    assert not any("Traceback" in line for line in err)


@pytest.mark.parametrize("name", ["", "pretrain", "evaluate", "pack", "index"])
def test_help_fits_a_screen(command: Command, name: str) -> None:
    code, out, err = command(*([name] if name else []), "--help")
    assert (code, err) == (0, [])
    lines = out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert "Usage:" in out


def test_pack_index_and_evaluate(command: Command, mine: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    code, said, err = command("pack", photos, out)
    assert code == 0, err
    assert "48 images in 6 shards, 48 with one of 4 labels" in " ".join(said.split())  # wrapped, by the path's length
    assert Dataset.open(out).num_samples == 48

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for tar in out.glob("*.tar"):
        shutil.copy(tar, foreign)
    code, said, err = command("index", foreign, "--verify")
    assert code == 0, err
    assert "48 images" in " ".join(said.split())
    assert Dataset.open(foreign).num_samples == 48

    (mine / "summary.json").unlink()
    code, said, err = command("evaluate", mine, "--task", "knn", "eval.neighbours=5", "eval.fit.steps=3")
    assert code == 0, err
    assert {(row.backbone, row.task) for row in read_summary(mine)} == {(name, "knn") for name in BACKBONES}
    assert "accuracy" in said


def test_without_a_command_it_is_pretrain(command: Command, tmp_path: Path) -> None:
    check_refused(command("train.epoch=3"), "did you mean epochs?")
    check_refused(command("--config", tmp_path / "no.yaml"), "No such file")


def test_a_run_folders_config_is_a_config_file(mine: Path) -> None:
    text = (mine / "config.yaml").read_text()
    assert config.dump(config.load(mine / "config.yaml", [], method.options)) == text


def test_as_a_process_a_mistake_is_one_line_and_exit_code_2(photos: Path, tmp_path: Path) -> None:
    done = launch_here("pretrain", *settings(tmp_path / "nowhere", tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert f"error: data.source={tmp_path / 'nowhere'}: does not exist" in done.stderr
