"""A backbone in a form that others load: torchvision's or timm's names, safetensors, ONNX, with a model card.

An exported file is loaded again in its own library's class, and its features of real images are compared with ours,
before it gets its name. So a file that is there gives the same features.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distssl import atomic, checkpoint, config, job, method
from distssl.config import Run
from distssl.context import Context
from distssl.data import augment
from distssl.data.shards import Dataset
from distssl.downstream import features
from distssl.downstream.rows import read_summary
from distssl.errors import ConfigError, RunError
from distssl.nn import backbones
from distssl.nn.backbones import Backbone, Convolutional

FORMATS = {"torchvision": "pt", "timm": "pt", "safetensors": "safetensors", "onnx": "onnx"}
CARD = "MODEL_CARD.md"
NUM_IMAGES = 64
MOST_ERROR = 1e-4  # of a feature, relative to the largest
IN_TIMM_TOO = ("resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2")  # under torchvision's names

Features = Callable[[Tensor], Tensor]  # [N, 3, S, S] -> [N, D]


@dataclass(frozen=True)
class Exported:
    """A file and how far its features are from ours: the largest difference, and that over the largest feature."""

    file: Path
    error: float
    relative_error: float


def export(run: Run, run_dir: Path, form: str, out: Path | None = None, licence: str | None = None) -> Exported:
    """Write the newest checkpoint's backbone as backbone.SUFFIX, and its card, into a folder, by default RUN/export.

    form: one of FORMATS. Raises ConfigError where there is no checkpoint or the format cannot hold this backbone, and
    RunError where the file does not give the same features.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: {', '.join(FORMATS)} are right")
    backbone = job.trained(run, run_dir).evaluated().float().eval()
    _refuse(run, backbone, form)
    dataset, images = _images(run, run_dir)
    out = (out or run_dir / "export").resolve()
    atomic.make_folder(out)
    file = out / f"backbone.{FORMATS[form]}"
    with atomic.locked(out):
        with atomic.replacing(file) as part:
            _WRITERS[form](run, backbone, images, part)
            error, relative = _compare(backbone, _READERS[form](run, part), images)
            if not relative <= MOST_ERROR:
                raise RunError(f"{file}: its features differ from ours by {relative:.1e} of the largest; not written")
        exported = Exported(file, error, relative)
        with atomic.replacing(out / CARD) as part:
            part.write_text(_card(run, run_dir, form, exported, dataset, images, licence))
    return exported


def _refuse(run: Run, backbone: Backbone, form: str) -> None:
    """Raises ConfigError where a format has no place for the backbone."""
    name, plain = run.model.backbone, isinstance(backbone, Convolutional)
    problem = None
    if form in ("torchvision", "timm") and type(backbone) not in (Convolutional, backbones.Timm):
        problem = f"{run.method.name} sees other images than its library's network would"
    elif form in ("torchvision", "timm") and run.model.sobel:
        problem = "its input passes a Sobel filter"
    elif form == "torchvision" and not plain:
        problem = f"{name} is timm's"
    elif form == "timm" and plain and name not in IN_TIMM_TOO:
        problem = f"timm has no {name} with these names"
    elif form in ("torchvision", "timm") and plain and not _is_torchvisions(run):
        problem = "its stem or width is not torchvision's"
    if problem:
        raise ConfigError(f"--format {form}: {problem}; safetensors or onnx is right")


def _is_torchvisions(run: Run) -> bool:
    """Whether torchvision has this network with these shapes."""
    from torchvision import models

    standard = run.model.stem == backbones.STEMS[0] and run.model.options.get("width", 64) == 64
    return run.model.backbone in models.list_models() and standard


def _images(run: Run, run_dir: Path) -> tuple[Dataset, Tensor]:
    """The pretraining data, and evaluation crops of some of its images, [N, 3, S, S]."""
    dataset = Dataset.open(job.folders(run, []).data)
    ids = np.linspace(0, dataset.num_samples - 1, min(NUM_IMAGES, dataset.num_samples)).astype(np.int64)
    with Context(run_dir) as context:
        how = features.Extraction.of_run(run, torch.device("cpu"))
        found = features.crops(dataset, np.unique(ids), how, context)
    return dataset, torch.stack(list(found.values()))


@torch.no_grad()
def _compare(backbone: Backbone, exported: Features, images: Tensor) -> tuple[float, float]:
    ours = backbone(images)
    theirs = exported(images)
    if theirs.shape != ours.shape:
        raise RunError(f"the exported network gives features {list(theirs.shape)}, ours {list(ours.shape)}")
    error = float((ours - theirs).abs().max())
    return error, error / float(ours.abs().max())


def _state(backbone: Backbone) -> dict[str, Tensor]:
    """The network's own state, under its library's names."""
    return {name: value.detach().contiguous().clone() for name, value in backbone.net.state_dict().items()}


def _write_state(run: Run, backbone: Backbone, images: Tensor, path: Path) -> None:
    torch.save(_state(backbone), path)


def _read_torchvision(run: Run, path: Path) -> Features:
    from torchvision import models

    net = models.get_model(run.model.backbone, weights=None)
    state = torch.load(path, weights_only=True)
    heads = ("fc.", "classifier.")
    missing = [name for name in net.state_dict() if name not in state and not name.startswith(heads)]
    found = net.load_state_dict(state, strict=False)
    if missing or found.unexpected_keys:
        raise RunError(
            f"torchvision's {run.model.backbone} lacks {missing[:3]} or does not know {found.unexpected_keys[:3]}"
        )
    net.eval()
    if hasattr(net, "fc"):
        net.fc = torch.nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        return net
    return lambda images: torch.nn.functional.adaptive_avg_pool2d(net.features(images), 1).flatten(1)  # pyright: ignore


def _read_timm(run: Run, path: Path) -> Features:
    import timm

    options = {} if run.model.backbone in IN_TIMM_TOO else run.model.options
    net = timm.create_model(run.model.backbone, pretrained=False, num_classes=0, **options)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def _write_safetensors(run: Run, backbone: Backbone, images: Tensor, path: Path) -> None:
    from safetensors import torch as safetensors

    state = {name: value.detach().contiguous().clone() for name, value in backbone.state_dict().items()}
    model = {key: json.dumps(value) for key, value in run.model.model_dump(mode="json").items()}
    safetensors.save_file(state, path, metadata={"method": run.method.name, **model})


def _read_safetensors(run: Run, path: Path) -> Features:
    from safetensors import torch as safetensors

    net = method.build(run).evaluated()  # a fresh one, in which nothing of ours is left
    net.load_state_dict(safetensors.load_file(path))
    return net.eval()


def _write_onnx(run: Run, backbone: Backbone, images: Tensor, path: Path) -> None:
    import io
    import warnings

    graph = io.BytesIO()  # torch would name a large model's weights after the path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no further package is called deprecated
        torch.onnx.export(
            backbone,
            (images[:2].contiguous(),),
            graph,  # pyright: ignore[reportArgumentType] - a file opened for writing is right, by its documentation
            input_names=["images"],
            output_names=["features"],
            dynamic_axes={"images": {0: "N"}, "features": {0: "N"}},
            dynamo=False,
        )
    path.write_bytes(graph.getvalue())


def _read_onnx(run: Run, path: Path) -> Features:
    onnxruntime = _require("onnxruntime")
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.contiguous().numpy()})[0])


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(f'--format onnx: {name} is not installed; pip install "distssl[onnx]" is right') from None


_WRITERS = {
    "torchvision": _write_state,
    "timm": _write_state,
    "safetensors": _write_safetensors,
    "onnx": _write_onnx,
}
_READERS = {
    "torchvision": _read_torchvision,
    "timm": _read_timm,
    "safetensors": _read_safetensors,
    "onnx": _read_onnx,
}
_HOW_TO_LOAD = {
    "torchvision": 'model = torchvision.models.get_model("{name}")\n'
    'model.load_state_dict(torch.load("backbone.pt"), strict=False)  # all but the classifier',
    "timm": 'model = timm.create_model("{name}", num_classes=0)\nmodel.load_state_dict(torch.load("backbone.pt"))',
    "safetensors": 'model = distssl.nn.backbones.build("{name}", ...)  # stem, options: in the file\'s metadata\n'
    'model.load_state_dict(safetensors.torch.load_file("backbone.safetensors"))',
    "onnx": 'session = onnxruntime.InferenceSession("backbone.onnx")\n'
    'features = session.run(None, {{"images": images}})[0]',
}


def _card(
    run: Run, run_dir: Path, form: str, exported: Exported, dataset: Dataset, images: Tensor, licence: str | None
) -> str:
    state = checkpoint.newest(run_dir)
    assert state is not None
    told = inspect.getdoc(importlib.import_module(method.find(run.method.name).__module__)) or ""
    size_px = images.shape[-1]
    lines = [
        f"# {run.run_name}: {run.model.backbone} pretrained by {run.method.name}",
        "",
        told.partition("\n\n")[0],
        "",
        f"- method: {run.method.name}; link: {_link(told)}",
        f"- backbone: {run.model.backbone}, stem {run.model.stem}, options {run.model.options or 'none'}",
        f"- data: {run.data.source}, {dataset.num_samples} images, fingerprint {dataset.fingerprint}",
        f"- training: {state['step']} steps of {run.data.global_batch * run.train.accumulate} images, seed {run.seed}",
        f"- config: sha256 {hashlib.sha256(config.dump(run).encode()).hexdigest()}",
        f"- file: {exported.file.name}, sha256 {hashlib.sha256(exported.file.read_bytes()).hexdigest()}",
        f"- input: RGB [N, 3, {size_px}, {size_px}] in 0..1, less the mean {augment.MEAN}, over {augment.STD}",
        f"- largest difference from the trained network's features, on {len(images)} of its images: "
        f"{exported.error:.1e}, {exported.relative_error:.1e} of the largest feature",
        f"- licence: {licence or 'to be filled in by whoever publishes it'}",
        "",
        "```python",
        _HOW_TO_LOAD[form].format(name=run.model.backbone),
        "```",
        "",
    ]
    rows = read_summary(run_dir)
    if rows:
        lines += ["| data | task | labels | metric | backbone | value |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row.data} | {row.task} | {row.labels or 'all'} | {row.metric} | {row.backbone} | {row.value:.4f} |"
            for row in rows
        ]
    return "\n".join(lines) + "\n"


def _link(text: str) -> str:
    return next((word.strip("().,;") for word in text.split() if word.strip("(").startswith("http")), "none")
