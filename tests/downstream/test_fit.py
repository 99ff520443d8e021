"""Every task that trains a network: the same at any number of workers, after a crash, and it learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distssl import config, method, plan
from distssl.config import Run
from distssl.context import Context
from distssl.data import shards
from distssl.downstream import fit, pictures, rows
from distssl.downstream.evaluate import Evaluation
from distssl.downstream.fit import Fitting
from distssl.errors import ConfigError, RunError
from distssl.mirror import Mirror
from tests import annotated, planted, runs

STEPS = 6
FIT = [f"eval.fit.steps={STEPS}", "eval.fit.batch=8", "eval.fit.size_px=32", "eval.fit.lr=0.003", "eval.num_seeds=2"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By task."""
    folder = tmp_path_factory.mktemp("labelled")
    marked = shards.pack(str(annotated.images(folder / "marked", 24)), folder / "marked-packed")
    photos = shards.pack(str(runs.photos(folder / "photos", num=48)), folder / "photos-packed")
    return {task: photos if task == "finetune" else marked for task in config.FITTED_TASKS}


def fitting(run: Run, task: str, context: Context, name: str = "supervised") -> Fitting:
    judge = Evaluation(run, context, shards.Dataset.open(Path(run.data.source)), None)
    return judge._fitting(task, name, *judge._job(task, name, None, 0))


def train_here(run: Run, task: str, stop_at: int | None = None) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Metrics and parameters at the end; with stop_at, of a run that dies after so many steps and is started again."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    with Context(run.run_dir) as context:
        if stop_at is not None:
            first = fitting(run, task, context)
            for _, batch in zip(range(stop_at), first._batches(), strict=False):
                first._take_step(batch)
                if first.step == stop_at - 1:  # the last step before the crash is lost
                    first._checkpoint()
        whole = fitting(run, task, context)
        assert whole.step == (stop_at - 1 if stop_at else 0)
        whole.run()
        return whole.score(), [parameter.detach().clone() for parameter in whole.network.parameters()]


@pytest.mark.parametrize("part", ["train", "test"])
def test_networks_of_too_many_images_that_cannot_be_read_give_no_figures(tmp_path: Path, part: str) -> None:
    marked = shards.pack(str(annotated.images(tmp_path / "marked", 24)), tmp_path / "packed")
    run = runs.tiny(marked, tmp_path, *FIT)
    run.run_dir.mkdir(parents=True)
    with Context(run.run_dir) as context:
        job = fitting(run, "segment", context).job
        for sample in (job.train_ids if part == "train" else job.test_ids)[:3].tolist():
            planted.overwrite(job.train, sample, bytes(job.train.rows(np.array([sample])).size[0]))
        broken = fitting(run, "segment", context)
        if part == "test":
            broken.run()
        with pytest.raises(RunError, match=rf"3 of the \d+ samples of .*, to {part} on seen are bad"):
            (broken.score if part == "test" else broken.run)()


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    x, y = (torch.cat([p.flatten().double() for p in params]) for params in (a, b))
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("task", config.FITTED_TASKS)
def test_a_network_is_the_same_at_any_world_size(ranks, packed: dict[str, Path], tmp_path: Path, task: str) -> None:
    def at(name: str) -> Run:
        return runs.tiny(packed[task], tmp_path, f"name={name}", *FIT, "train.precision=float64")

    metrics, alone = train_here(at("alone"), task)
    with Context(tmp_path) as context:
        start = [parameter.detach().clone() for parameter in fitting(at("start"), task, context).network.parameters()]
    for of_rank, parameters in ranks(2).run(train_here, at("two"), task):
        assert distance(parameters, alone) < 1e-6
        assert distance(parameters, alone) < 0.1 * distance(start, alone)
        assert of_rank == pytest.approx(metrics, rel=1e-6)


@pytest.mark.parametrize("task", ["finetune", "detect"])
def test_a_network_that_died_is_the_one_that_did_not(packed: dict[str, Path], tmp_path: Path, task: str) -> None:
    whole = train_here(runs.tiny(packed[task], tmp_path, "name=whole", *FIT), task)
    broken = train_here(runs.tiny(packed[task], tmp_path, "name=broken", *FIT), task, stop_at=4)
    assert distance(broken[1], whole[1]) < 1e-6
    assert broken[0] == pytest.approx(whole[0])


LEARNED = {  # steps, metric, the value it must be better than
    "segment": (60, "miou", 0.8),
    "depth": (60, "delta_1", 0.8),
    "keypoints": (100, "mean_error", 8.0),
    "detect": (35, "ap50", 0.5),
}


@pytest.mark.parametrize("task", LEARNED)
def test_a_network_learns_a_red_rectangle(packed: dict[str, Path], tmp_path: Path, task: str) -> None:
    """What is easy to see is found: the targets are in the right places."""
    steps, metric, bound = LEARNED[task]
    learning = [*FIT, f"eval.fit.steps={steps}", "eval.fit.size_px=64", "eval.fit.jitter=0"]
    found, _ = train_here(runs.tiny(packed[task], tmp_path, *learning), task)
    assert found[metric] < bound if metric in rows.LOWER_IS_BETTER else found[metric] > bound


def test_the_head_alone_learns_on_a_random_backbone(packed: dict[str, Path], tmp_path: Path) -> None:
    run = runs.tiny(packed["segment"], tmp_path, *FIT)
    with Context(tmp_path) as context:
        started = fitting(run, "segment", context, "random")
        before = {name: value.clone() for name, value in started.network.state_dict().items()}
        started.run()
        moved = {name for name, value in started.network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("head.") for name in moved)  # the backbone's running statistics stay too


@pytest.mark.parametrize(("trained", "stages"), [("1", {"layer4"}), ("2", {"layer3", "layer4"})])
def test_the_last_stages_learn_lower_ones_more_slowly(
    packed: dict[str, Path], tmp_path: Path, trained: str, stages: set[str]
) -> None:
    run = runs.tiny(packed["finetune"], tmp_path, *FIT, f"eval.fit.trained={trained}", "eval.fit.layer_decay=0.5")
    with Context(tmp_path) as context:
        judge = Evaluation(run, context, shards.Dataset.open(packed["finetune"]), None, method.build(run))
        network = judge._fitting("finetune", "pretrained", *judge._job("finetune", "pretrained", None, 0)).network
    learning = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[2] for name in learning if name.startswith("backbone.")} == stages
    rates = {name: network.rate(name, parameter).scale for name, parameter in network.named_parameters()}
    assert rates["head.weight"] == 1
    assert rates["backbone.net.layer4.0.conv1.weight"] == 0.5
    assert rates["backbone.net.layer3.0.conv1.weight"] == 0.25


def test_what_was_reported_before_a_crash_is_reported_again(packed: dict[str, Path], tmp_path: Path) -> None:
    run = runs.tiny(packed["finetune"], tmp_path, *FIT)
    reports: list[list[tuple[int, int, dict[str, float]]]] = [[], [], []]

    def tell(to: int, stop_at: int | None = None) -> fit.Report:
        def report(step: int, steps: int, metrics: dict[str, float]) -> None:
            reports[to].append((step, steps, metrics))
            if step == stop_at:
                raise KeyboardInterrupt

        return report

    with Context(tmp_path) as context:
        judge = Evaluation(run, context, shards.Dataset.open(packed["finetune"]), None)
        with pytest.raises(KeyboardInterrupt):
            judge.figure("finetune", "random", None, 0, tell(0, stop_at=4), every=2)
        judge.figure("finetune", "random", None, 0, tell(1), every=2)
        judge.figure("finetune", "random", None, 0, tell(2), every=2)
    assert [step for step, _, _ in reports[1]] == [2, 4, 6]
    assert reports[1] == reports[2]
    assert reports[0] == reports[1][:2]


def test_reports_without_a_checkpoint_are_of_work_that_is_done_again(packed: dict[str, Path], tmp_path: Path) -> None:
    """A crash between the first report and its checkpoint: nothing is told twice."""
    run = runs.tiny(packed["finetune"], tmp_path, *FIT)
    told: list[int] = []
    with Context(tmp_path) as context:
        judge = Evaluation(run, context, shards.Dataset.open(packed["finetune"]), None)
        folder = judge._job("finetune", "random", None, 0)[0].folder
        folder.mkdir(parents=True)
        (folder / fit.REPORTS).write_text(json.dumps({"step": 2, "steps": STEPS, "accuracy": 0.5}) + "\n")
        judge.figure("finetune", "random", None, 0, lambda step, steps, metrics: told.append(step), every=2)
    assert told == [2, 4, 6]


@pytest.mark.parametrize("at_url", [False, True])
def test_a_finished_fit_keeps_its_network_only_where_it_is_read_again(
    packed: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest, at_url: bool
) -> None:
    run = runs.tiny(packed["finetune"], tmp_path, *FIT)
    dataset = shards.Dataset.open(packed["finetune"])
    with Context(tmp_path / "run") as context:
        if at_url:
            context.mirror = Mirror(context.run_dir, f"{request.getfixturevalue('bucket')}/runs/mine")
        judge = Evaluation(run, context, dataset, None)
        fits = [("random", None, 0), ("supervised", "50%", 0), ("supervised", None, 1), ("supervised", None, 0)]
        figures = [judge.figure("finetune", name, how_many, seed) for name, how_many, seed in fits]
        kept = judge._job("finetune", "supervised", None, 0)[0].folder
        assert [path.parent.parent for path in context.run_dir.glob("fits/*/checkpoints/step_*")] == [kept]
        if context.mirror:
            there = [name for name in context.mirror.remote.names() if "/step_" in name]
            assert {name.partition("/checkpoints")[0] for name in there} == {context.mirror.name(kept)}
            assert len(there) == 2
        assert [judge.figure("finetune", *asked) for asked in fits] == figures
        whole = fitting(run, "finetune", context)
        assert whole.step == STEPS
        assert judge.backbone("supervised").state_dict().keys() == whole.network.backbone.state_dict().keys()


def test_one_image_a_step_is_refused(packed: dict[str, Path], tmp_path: Path) -> None:
    """BatchNorm would raise in torch's words at 16 px, where the last map has one place."""
    run = runs.tiny(packed["finetune"], tmp_path, *FIT)
    with Context(tmp_path) as context:
        judge = Evaluation(run, context, shards.Dataset.open(packed["finetune"]), None)
        with pytest.raises(
            ConfigError, match=r"^eval\.fit\.batch=8, for 1 labels: BatchNorm cannot learn from one image"
        ):
            judge.figure("finetune", "supervised", 1, 0)
        assert judge.figure("finetune", "supervised", 2, 0)["accuracy"] >= 0


def test_few_test_images_are_drawn_and_micro_batches_stay_behind(packed: dict[str, Path], tmp_path: Path) -> None:
    run = runs.tiny(packed["segment"], tmp_path, *FIT, "train.micro_batch=8", "data.lanes=4")
    trained = method.build(run)
    trained.backbone.micro_batches = plan.of_run(run, shards.Dataset.open(packed["segment"]), 1).micro_batches
    with Context(tmp_path) as context:
        judge = Evaluation(run, context, shards.Dataset.open(packed["segment"]), None, trained)
        assert judge.backbone("pretrained").micro_batches is None
        assert len(judge.labelled("mask").test_ids) < pictures.NUM_PREDICTED
        assert judge.figure("segment", "pretrained", None, 0)["miou"] > 0
    assert len(list((tmp_path / pictures.FOLDER).glob("segment_*_pretrained.png"))) == 1
