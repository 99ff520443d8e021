"""What every file in distssl/methods promises, whatever is in it: there is no list to edit."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from distssl import checkpoint, method, monitor, train
from distssl.config import Run
from distssl.context import Context
from distssl.data.shards import Dataset
from tests import runs

CONFIGS = Path(__file__).parent.parent.parent / "configs/pretrain"
NAMES = method.names()
ALWAYS_THERE = {"id", "label", "labelled.id"}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"), num=96)


def training_of(run: Run, context: Context) -> train.Training:
    dataset = Dataset.open(Path(run.data.source))
    labelled = dataset if method.find(run.method.name).learns_from_labels else None
    return train.Training(run, context, dataset, labelled=labelled)


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_has_the_equation_the_paper_and_its_link(name: str) -> None:
    said = inspect.getdoc(inspect.getmodule(method.find(name))) or ""
    assert re.search(r"https://\S+", said)
    assert re.search(r"^ {4}.* = ", said, re.MULTILINE), "an indented line with the equation"
    assert re.search(r"(19|20)\d\d", said), "the paper's year"


@pytest.mark.parametrize("name", NAMES)
def test_there_is_a_config_that_names_its_source(name: str) -> None:
    found = [path for path in CONFIGS.glob("*.yaml") if yaml.safe_load(path.read_text())["method"]["name"] == name]
    assert found
    for path in found:
        head = path.read_text().split("\nname:")[0]
        for word in ("Paper:", "Command:", "Published:", "Measured here:", path.name):
            assert word in head, path.name


class Watched(dict[str, Tensor]):
    """A dict that notes what is read from it."""

    def __init__(self, views: dict[str, Tensor]) -> None:
        super().__init__(views)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_reads_every_view_and_moves_every_parameter(name: str, packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, f"method.name={name}")
    with Context(run.run_dir) as context:
        training = training_of(run, context)
        training.start_epoch()
        views = Watched(next(training.batches()))
        outputs = training.method.train()(views)
        training.close()
    assert views.read - ALWAYS_THERE == views.keys() - ALWAYS_THERE
    assert outputs["loss"].ndim == 0
    assert outputs["loss"].isfinite()
    outputs["loss"].backward()
    gradients = {key: p.grad for key, p in training.method.named_parameters() if p.requires_grad}
    assert not [key for key, gradient in gradients.items() if gradient is None], "DDP waits for these"
    biases = [p for key, p in training.method.named_parameters() if key.endswith("bias")]
    assert all(p.ndim == 1 for p in biases), "weight decay and LARS leave out what has one dimension"
    assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)
    of_backbone = [p.grad for p in training.method.backbone.parameters() if p.grad is not None]
    assert sum(float(gradient.norm()) for gradient in of_backbone) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_run_stopped_in_mid_epoch_goes_on_as_if_it_had_not(name: str, packed: Path, tmp_path: Path) -> None:
    settings = [f"method.name={name}", "train.precision=float64", "train.epochs=1"]
    whole, broken = (runs.tiny(packed, tmp_path, f"name={which}", *settings) for which in ("whole", "broken"))
    for run, stops in ((whole, [None]), (broken, [3, None])):
        for stop_at in stops:
            with Context(run.run_dir) as context:
                training = training_of(run, context)
                context.stop_requested = lambda at=stop_at, of=training: of.step == at  # type: ignore[method-assign]
                training.run()
    expected, got = (
        [row["loss"] for row in monitor.read_jsonl(run.run_dir / monitor.METRICS)] for run in (whole, broken)
    )
    assert len(expected) == 6
    assert got == pytest.approx(expected, rel=1e-9)
    a, b = (checkpoint.newest(run.run_dir) for run in (whole, broken))
    assert a is not None
    assert b is not None
    for key, value in a["model"].items():
        torch.testing.assert_close(
            b["model"][key], value, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_is_of_images_as_the_network_sees_them(name: str, packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, f"method.name={name}")
    with Context(run.run_dir) as context:
        training = training_of(run, context)
        training.start_epoch()
        views = {key: view[:2] for key, view in next(training.batches()).items()}
        training.close()
    with torch.no_grad():
        shown = training.method.eval().picture(views)
    assert shown
    for image in shown:
        assert image.shape[:2] == (2, 3)
        assert image.isfinite().all()
