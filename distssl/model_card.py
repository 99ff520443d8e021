"""The model card beside an exported backbone: where it comes from, how good it is, how it is loaded."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distssl import config, method, plan
from distssl.config import Run
from distssl.data import augment
from distssl.data.shards import Dataset
from distssl.downstream.rows import read_summary, told_apart

CARD = "MODEL_CARD.md"
IN_TIMM_TOO = ("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2")  # under torchvision's names

PLAIN = ("alexnet", "vgg16", "vgg16_bn")  # of torchvision's: their features are of the convolutions


@dataclass(frozen=True)
class Exported:
    """A file and how far its features are from ours: the largest difference, and that over the largest feature."""

    file: Path
    error: float
    relative_error: float


def _how_to_load(run: Run, form: str) -> str:
    """Code that makes `features` of `images`."""
    name, plain = run.model.backbone, run.model.backbone in PLAIN
    options = "" if name in IN_TIMM_TOO or not run.model.options else f", **{run.model.options!r}"
    head = "classifier" if plain else "fc"
    lines = {
        "torchvision": [
            "import torch, torchvision",
            f'model = torchvision.models.get_model("{name}", weights=None).eval()',
            f'model.load_state_dict(torch.load("torchvision.pt"), strict=False)  # misses only {head}.*',
            *([] if plain else ["model.fc = torch.nn.Identity()"]),
            f"features = model{'.features' if plain else ''}(images){'.mean((2, 3))' if plain else ''}",
        ],
        "timm": [
            "import timm, torch",
            f'model = timm.create_model("{name}", num_classes=0{options}).eval()',
            'model.load_state_dict(torch.load("timm.pt"))',
            "features = model(images)",
        ],
        "safetensors": ["from distssl import export", 'features = export.load("safetensors.safetensors")(images)'],
        "onnx": [
            "import onnxruntime",
            'session = onnxruntime.InferenceSession("onnx.onnx")',
            'features = session.run(None, {"images": images})[0]  # numpy',
        ],
    }
    return "\n".join(lines[form])


def text(
    run: Run,
    run_dir: Path,
    state: Mapping[str, Any],
    form: str,
    exported: Exported,
    dataset: Dataset,
    images: Tensor,
    licence: str | None,
) -> str:
    same = dataset.fingerprint == state["dataset"]  # the source may have changed since
    epochs = f", epoch {state['step'] / plan.of_run(run, dataset, 1).steps_per_epoch:.4g}" if same else ""
    told = inspect.getdoc(importlib.import_module(method.find(run.method.name).__module__)) or ""
    size_px = images.shape[-1]
    lines = [
        f"# {run.run_name}: {run.model.backbone} pretrained by {run.method.name}",
        "",
        told.partition("\n\n")[0],
        "",
        f"- method: {run.method.name}; link: {_link(told)}",
        f"- backbone: {run.model.backbone}, stem {run.model.stem}, options {run.model.options or 'none'}"
        + (", behind a Sobel filter" if run.model.sobel else ""),
        f"- started from: {_start(run)}",
        f"- data: {run.data.source}, {f'{dataset.num_samples} images' if same else 'other images now'}, "
        f"fingerprint {state['dataset']}",
        f"- training: {state['step']} steps of {run.data.global_batch * run.train.accumulate} images{epochs} of "
        f"{run.train.epochs}, seed {run.seed}",
        f"- checkpoint: sha256 {state['sha256']}",
        f"- config: sha256 {hashlib.sha256(config.dump(run).encode()).hexdigest()}",
        f"- file: {exported.file.name}, sha256 {hashlib.sha256(exported.file.read_bytes()).hexdigest()}",
        f"- input: RGB [N, 3, {size_px}, {size_px}] in 0..1, less the mean {augment.MEAN}, over {augment.STD}; "
        f"evaluation takes the middle after resizing the short side to {round(size_px / run.eval.crop)} px",
        f"- largest difference from the trained network's features, on {len(images)} of its images: "
        f"{exported.error:.1e}, {exported.relative_error:.1e} of the largest feature",
        f"- licence: {licence or 'to be filled in by whoever publishes it'}",
        "",
        "```python",
        _how_to_load(run, form),
        "```",
        "",
    ]
    rows = read_summary(run_dir)
    if rows:
        lines += ["| data | task | labels | metric | backbone | value |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row.data} | {row.task} | {row.amount} | {row.metric} | {row.backbone} | {row.value:.4f} |"
            for row in told_apart(rows)
        ]
    return "\n".join(lines) + "\n"


def _start(run: Run) -> str:
    model = run.model
    return f"{model.init}, weights of sha256 {model.init_sha256}" if model.init else "random weights"


def _link(text: str) -> str:
    return next((word.strip("().,;") for word in text.split() if word.strip("(").startswith("http")), "none")
