from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distssl import checkpoint, job, method, monitor, run_folder, train
from distssl.config import Run
from distssl.context import Context, stop_file
from distssl.data import shards
from distssl.data.shards import Dataset
from distssl.errors import ConfigError, RunError
from distssl.nn import precision
from tests import runs


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"))


def train_here(run: Run, stop_at: int | None = None) -> list[torch.Tensor]:
    """Train in this process, a rank or alone; the parameters at the end. Stops as Ctrl-C does at `stop_at`."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    with Context(run.run_dir) as context:
        training = train.Training(run, context, Dataset.open(Path(run.data.source)))
        if stop_at is not None:
            context.stop_requested = lambda: training.step == stop_at  # type: ignore[method-assign]
        finished = training.run()
        assert finished == (stop_at is None)
        return [parameter.detach().clone() for parameter in training.method.parameters()]


def losses(run: Run) -> list[float]:
    rows = monitor.read_jsonl(run.run_dir / monitor.METRICS)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def ledger(run: Run) -> list[dict]:
    return monitor.read_jsonl(run.run_dir / monitor.LEDGER)


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """|a - b| / |b| over all parameters together."""
    x, y = (torch.cat([p.flatten().double() for p in params]) for params in (a, b))
    return float((x - y).norm() / y.norm())


# Training a network from its start makes a rounding error several times larger every step, at any world size. So
# float32 is held to its bounds at the learning rates of a long warm-up, and float64 at full ones.
SETTINGS = {
    "float32": (
        [
            "train.precision=float32",
            "train.optimizer=adamw",
            "train.lr=0.00003",
            "train.warmup_epochs=0",
            "train.epochs=20",
            "data.global_batch=64",
            "method.temperature=0.5",
        ],
        1e-4,
        1e-3,
    ),
    "sgd": (["train.precision=float64", "train.lr=0.05"], 1e-6, 1e-6),
    "adamw": (["train.precision=float64", "train.optimizer=adamw", "train.lr=0.001"], 1e-6, 1e-6),
    "lars": (["train.precision=float64", "train.optimizer=lars", "train.lr=0.3"], 1e-6, 1e-6),
    "accumulate": (["train.precision=float64", "train.accumulate=2", "train.epochs=7"], 1e-6, 1e-6),
    "micro_batch": (["train.precision=float64", "data.lanes=4", "train.micro_batch=8"], 1e-6, 1e-6),
    "clip": (["train.precision=float64", "train.clip_norm=0.5"], 1e-6, 1e-6),
}


AT_FOUR = ("float32", "sgd")  # also with four ranks, which have half a core each here; the others with -m slow


@pytest.mark.parametrize(
    ("name", "world_sizes"),
    [
        *((name, (2, 4) if name in AT_FOUR else (2,)) for name in SETTINGS),
        *(pytest.param(name, (4,), marks=pytest.mark.slow) for name in SETTINGS if name not in AT_FOUR),
    ],
)
def test_losses_and_parameters_are_the_same_at_any_world_size(
    ranks, packed: Path, tmp_path: Path, name: str, world_sizes: tuple[int, ...]
) -> None:
    settings, loss_bound, parameter_bound = SETTINGS[name]

    def at(world_size: int) -> Run:
        return runs.tiny(packed, tmp_path, f"name=w{world_size}", "train.epochs=3", *settings)

    start = [parameter.detach() for parameter in method.build(at(1)).parameters()]
    alone = train_here(at(1))
    assert len(losses(at(1))) >= 20
    for world_size in world_sizes:
        for of_rank in ranks(world_size).run(train_here, at(world_size)):
            assert distance(of_rank, alone) < parameter_bound
            assert distance(of_rank, alone) < 0.1 * distance(start, alone)  # and they did move
        assert losses(at(world_size))[:20] == pytest.approx(losses(at(1))[:20], rel=loss_bound)
        assert ledger(at(world_size)) == ledger(at(1))


def test_a_misspelt_metric_is_told_once_a_start(packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = runs.tiny(packed, tmp_path, "train.epochs=1", "checkpoint.keep_best=los")
    for num_starts, stop_at in ((1, 3), (2, None)):
        train_here(run, stop_at)
        told = [record.getMessage() for record in caplog.records if "keep_best" in record.getMessage()]
        assert len(told) == num_starts
    assert "checkpoint.keep_best=los: no such metric" in told[0]
    assert " loss, " in told[0]


def test_an_epoch_sees_each_sample_once_but_for_the_remainder(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, "train.epochs=2", "data.global_batch=20")
    train_here(run)
    num_samples = Dataset.open(packed).num_samples
    for epoch in range(2):
        ids = [i for row in ledger(run) if row["epoch"] == epoch for i in row["ids"]]
        assert len(ids) == len(set(ids)) == num_samples - num_samples % 20


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_takes_the_path_of_one_that_never_stopped(
    ranks, packed: Path, tmp_path: Path, world_size: int
) -> None:
    whole = runs.tiny(packed, tmp_path, "name=whole", "train.precision=float64", "train.epochs=2")
    expected = train_here(whole)
    broken = runs.tiny(packed, tmp_path, "name=broken", "train.precision=float64", "train.epochs=2")
    train_here(broken, stop_at=5)
    assert len(losses(broken)) == 5
    resumed = train_here(broken) if world_size == 1 else ranks(2).run(train_here, broken)[0]
    assert distance(resumed, expected) < (1e-12 if world_size == 1 else 1e-6)
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-12 if world_size == 1 else 1e-6)
    assert ledger(broken) == ledger(whole)


def test_a_run_that_goes_on_where_auto_is_another_computes_as_it_began(
    monkeypatch: pytest.MonkeyPatch, packed: Path, tmp_path: Path
) -> None:
    """As on a host without bf16, where what comes out is to be the same to the bit."""
    found = []
    for name, native in (("whole", [True]), ("broken", [True, False])):
        run = runs.tiny(packed, tmp_path, f"name={name}", "train.epochs=1", "train.precision=auto")
        for has_bf16 in native:
            monkeypatch.setattr(precision, "_has_native_bf16", lambda device, has=has_bf16: has)
            parameters = train_here(run, stop_at=3 if len(native) > 1 and has_bf16 else None)
        found.append(parameters)
    assert distance(*found) == 0


def test_lines_of_work_that_is_done_again_are_dropped(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, "train.epochs=1")
    train_here(run, stop_at=3)
    with open(run.run_dir / monitor.METRICS, "a") as file:
        file.write(json.dumps({"step": 4, "loss": 99.0}) + '\n{"step": 5, "lo')  # a crash in mid-line
    train_here(run)
    assert len(losses(run)) == 7
    assert 99.0 not in losses(run)


def test_a_damaged_checkpoint_is_passed_over(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, "train.epochs=1", "checkpoint.every=2")
    train_here(run, stop_at=5)
    newest = sorted(checkpoint.folder(run.run_dir).iterdir())[-1] / checkpoint.STATE
    newest.write_bytes(newest.read_bytes()[:1000])
    train_here(run)
    assert len(losses(run)) == 7


def test_a_run_folder_of_another_config_or_other_data_is_refused(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, "name=one", "train.epochs=1")
    job.prepare(run, 1)
    train_here(run, stop_at=2)
    before = (run.run_dir / run_folder.CONFIG).read_bytes()
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.05 there, 0\.1 here"):
        job.prepare(runs.tiny(packed, tmp_path, "name=one", "train.epochs=1", "train.lr=0.1"), 1)
    assert (run.run_dir / run_folder.CONFIG).read_bytes() == before
    job.prepare(runs.tiny(packed, tmp_path, "name=one", "train.epochs=1", "machine.threads=2"), 1)
    others = shards.pack(str(runs.photos(tmp_path / "others", seed=1)), tmp_path / "others_packed")
    with Context(run.run_dir) as context, pytest.raises(ConfigError, match="holds another run"):
        train.Training(run, context, Dataset.open(others))


def test_a_loss_that_is_not_finite_stops_the_run(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"loss is (nan|inf)"):
        train_here(runs.tiny(packed, tmp_path, "train.lr=1e30", "train.warmup_epochs=0", "train.epochs=2"))


def test_the_job_ends_with_rows_for_the_trained_and_the_random_backbone(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, "train.epochs=1", "eval.every=1")
    with Context(run.run_dir) as context:
        assert job.pretrain(run, context, job.prepare(run, 1))
    rows = json.loads((run.run_dir / "summary.json").read_text())["rows"]
    assert {(row["backbone"], row["task"], row["labels"]) for row in rows} == {
        (backbone, task, labels)
        for backbone in ("random", "pretrained")
        for task in ("knn", "linear")
        for labels in (20, None)
    }
    assert all(0 <= row["value"] <= 1 for row in rows)
    assert "knn" in (run.run_dir / monitor.METRICS).read_text()
    assert not stop_file(run.run_dir).exists()
