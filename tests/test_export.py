"""Exports: each format gives our features in its own library, and one that does not is not written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distssl import checkpoint, export, model_card, run_folder
from distssl.config import Run
from distssl.data.shards import Dataset
from distssl.errors import ConfigError, RunError
from distssl.nn import backbones
from tests import runs

STANDARD = ["model.backbone=resnet18", "model.stem=7x7_s2_pool", "model.options={}"]
VIT = [
    "model.backbone=vit_tiny_patch16_224",
    "model.stem=7x7_s2_pool",
    "model.options={img_size: 32, patch_size: 8, depth: 2}",
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"), num=32)


def trained(packed: Path, storage: Path, *overrides: str) -> Run:
    return runs.trained(runs.tiny(packed, storage, "train.epochs=1", "method.augment.size_px=32", *overrides))


CASES = [
    ("torchvision", STANDARD),
    ("torchvision", ["model.backbone=alexnet", "model.stem=7x7_s2_pool", "model.options={}", "eval.size_px=80"]),
    ("timm", STANDARD),
    ("timm", VIT),
    ("safetensors", []),
    ("safetensors", ["model.sobel=true"]),
    ("onnx", ["method.name=colorization"]),
    ("onnx", []),
    ("onnx", VIT),
]


@pytest.mark.parametrize(("form", "overrides"), CASES)
def test_an_exported_backbone_gives_the_same_features(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, overrides: list[str]
) -> None:
    run = trained(packed, tmp_path, *overrides, *(["method.augment.size_px=80"] if "alexnet" in str(overrides) else []))
    done = export.export(run, run.run_dir, form, licence="CC-BY-4.0")
    assert done.file.parent == run.run_dir / "export"
    assert done.relative_error < 1e-4
    card = (done.file.parent / model_card.CARD).read_text()
    for told in ("licence: CC-BY-4.0", Dataset.open(packed).fingerprint, "32 images", run.model.backbone, "arxiv.org"):
        assert told in card
    (manifest,) = checkpoint.folder(run.run_dir).glob("*/manifest.json")
    assert json.loads(manifest.read_text())["sha256"] in card
    images = torch.randn(3, 3, *[80 if "alexnet" in str(overrides) else 32] * 2)
    told_to_run: dict[str, Any] = {"images": images.numpy() if form == "onnx" else images}
    monkeypatch.chdir(done.file.parent)
    exec(re.findall("```python\n(.*?)```", card, re.DOTALL)[0], told_to_run)
    ours = run_folder.trained(run, run.run_dir).evaluated().eval()(images)
    theirs = torch.as_tensor(told_to_run["features"])
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max()


def test_formats_lie_beside_each_other(packed: Path, tmp_path: Path) -> None:
    run = trained(packed, tmp_path, *STANDARD)
    files = {export.export(run, run.run_dir, form).file for form in ("torchvision", "timm", "safetensors")}
    assert len(files) == 3
    assert all(file.exists() for file in files)


def test_a_state_that_is_not_ours_is_not_written(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(packed, tmp_path, *STANDARD)
    true_state = export._state

    def perturbed(backbone: backbones.Backbone) -> dict[str, torch.Tensor]:
        state = true_state(backbone)
        state["layer4.1.conv2.weight"] *= 1.01
        return state

    monkeypatch.setattr(export, "_state", perturbed)
    with pytest.raises(RunError, match="differ from ours"):
        export.export(run, run.run_dir, "torchvision")
    assert list((run.run_dir / "export").glob("*.pt")) == []

    def without(backbone: backbones.Backbone) -> dict[str, torch.Tensor]:
        return {name: value for name, value in true_state(backbone).items() if name != "layer1.0.bn1.weight"}

    monkeypatch.setattr(export, "_state", without)
    with pytest.raises(RunError, match=r"lacks \['layer1.0.bn1.weight'\]"):
        export.export(run, run.run_dir, "torchvision")


def test_a_backbone_that_gives_zeros_proves_nothing(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(packed, tmp_path, *STANDARD)
    collapsed, state = run_folder.restored(run, run.run_dir)
    for parameter in collapsed.parameters():
        torch.nn.init.zeros_(parameter)
    monkeypatch.setattr(run_folder, "restored", lambda run, run_dir: (collapsed, state))
    with pytest.raises(RunError, match="every feature of 32 images is 0: the backbone has collapsed"):
        export.export(run, run.run_dir, "torchvision")
    assert list((run.run_dir / "export").glob("*.pt")) == []


@pytest.mark.parametrize(
    ("form", "overrides", "told"),
    [
        ("torchvision", [], "its stem or width is not torchvision's; right: safetensors, onnx"),
        ("timm", [], "timm has no resnet10"),
        ("torchvision", VIT, "vit_tiny_patch16_224 is timm's; right: timm, safetensors, onnx"),
        ("safetensors", ["method.name=colorization"], "colorization puts Grey before the backbone.*right: onnx"),
        ("pickle", [], "torchvision, timm, safetensors, onnx are right"),
    ],
)
def test_a_format_that_cannot_hold_it_is_refused(
    packed: Path, tmp_path: Path, form: str, overrides: list[str], told: str
) -> None:
    run = trained(packed, tmp_path, *overrides)
    with pytest.raises(ConfigError, match=told):
        export.export(run, run.run_dir, form)
    assert not (run.run_dir / "export").exists()


def test_without_a_checkpoint_there_is_nothing_to_export(packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path)
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        export.export(run, run.run_dir, "safetensors")
    assert run_folder.CONFIG == "config.yaml"


def test_without_onnxruntime_it_says_what_to_install(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    run = trained(packed, tmp_path)
    monkeypatch.setattr(export.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r'pip install "distssl\[onnx\]"'):
        export.export(run, run.run_dir, "onnx")
