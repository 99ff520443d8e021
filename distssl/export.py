"""A backbone in a form that others load: torchvision's or timm's names, safetensors, ONNX, with a model card.

An exported file is loaded again in its own library's class, and its features of real images are compared with ours,
before it gets its name. So a file that is there gives the same features.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distssl import atomic, job, model_card, run_folder, weights
from distssl.config import Run
from distssl.context import Context
from distssl.data.shards import Dataset
from distssl.downstream import features
from distssl.errors import ConfigError, RunError
from distssl.nn import backbones
from distssl.nn.backbones import Backbone, Convolutional
from distssl.weights import Weights

FORMATS = {"torchvision": "pt", "timm": "pt", "safetensors": "safetensors", "onnx": "onnx"}
NUM_IMAGES = 64
BATCH_SIZE = 16
MOST_ERROR = 1e-4  # of a feature, relative to the largest

Features = Callable[[Tensor], Tensor]  # [N, 3, S, S] -> [N, D]


def export(
    run: Run, run_dir: Path, form: str, out: Path | None = None, licence: str | None = None
) -> model_card.Exported:
    """Write the newest checkpoint's backbone as FORMAT.SUFFIX, and its card, into a folder, by default RUN/export.

    form: one of FORMATS. Raises ConfigError where there is no checkpoint or the format cannot hold this backbone, and
    RunError where the file does not give the same features.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: {', '.join(FORMATS)} are right")
    trained, state = run_folder.restored(run, run_dir)
    backbone = trained.evaluated().float().eval()
    _refuse(run, backbone, form)
    dataset, images = _images(run, run_dir)
    out = (out or run_dir / "export").resolve()
    atomic.make_folder(out)
    file = out / f"{form}.{FORMATS[form]}"  # two of the formats end in .pt
    with atomic.locked(out):
        with atomic.replacing(file) as part:
            _WRITERS[form](run, backbone, images, part)
            error, relative = _compare(backbone, _READERS[form](run, part), images)
            if not relative <= MOST_ERROR:
                raise RunError(f"{file}: its features differ from ours by {relative:.1e} of the largest; not written")
        exported = model_card.Exported(file, error, relative)
        with atomic.replacing(out / model_card.CARD) as part:
            part.write_text(model_card.text(run, run_dir, state, form, exported, dataset, images, licence))
    return exported


def _refuse(run: Run, backbone: Backbone, form: str) -> None:
    """Raises ConfigError where a format has no place for the backbone."""
    problem = _problem(run, backbone, form)
    if problem:
        right = [other for other in FORMATS if _problem(run, backbone, other) is None]
        raise ConfigError(f"--format {form}: {problem}; right: {', '.join(right)}")


def _problem(run: Run, backbone: Backbone, form: str) -> str | None:
    name, plain = run.model.backbone, isinstance(backbone, Convolutional)
    problem = None
    if form != "onnx" and type(backbone) not in (Convolutional, backbones.Timm):
        problem = f"{run.method.name} puts {type(backbone).__name__} before the backbone, which only a graph holds"
    elif form in ("torchvision", "timm") and run.model.sobel:
        problem = "its input passes a Sobel filter"
    elif form == "torchvision" and not plain:
        problem = f"{name} is timm's"
    elif form == "timm" and plain and name not in model_card.IN_TIMM_TOO:
        problem = f"timm has no {name} with these names"
    elif form in ("torchvision", "timm") and plain and not _is_torchvisions(run):
        problem = "its stem or width is not torchvision's"
    return problem


def _is_torchvisions(run: Run) -> bool:
    """Whether torchvision has this network with these shapes."""
    from torchvision import models

    standard = run.model.stem == backbones.STEMS[0] and run.model.options.get("width", 64) == 64
    return run.model.backbone in models.list_models() and standard


def _images(run: Run, run_dir: Path) -> tuple[Dataset, Tensor]:
    """The pretraining data, and evaluation crops of some of its images, [N, 3, S, S]."""
    dataset = Dataset.open(job.folders(run, []).data, run.machine)
    ids = np.linspace(0, dataset.num_samples - 1, min(NUM_IMAGES, dataset.num_samples)).astype(np.int64)
    with Context(run_dir) as context:
        context.device = torch.device("cpu")  # the same proof on every machine
        how = features.Extraction.of_run(run, context.device)
        found = features.crops(dataset, np.unique(ids), how, context)
    if not found:
        raise RunError(f"{run.data.source}: none of {len(ids)} images can be read, so nothing can be proved")
    return dataset, torch.stack(list(found.values()))


@torch.no_grad()
def _compare(backbone: Backbone, exported: Features, images: Tensor) -> tuple[float, float]:
    parts = (images[:1], *images[1:].split(BATCH_SIZE))  # of one image too: a traced graph may hold the number
    ours, theirs = (torch.cat([net(part) for part in parts]) for net in (backbone, exported))  # [N, D] each
    if theirs.shape != ours.shape:
        raise RunError(f"the exported network gives features {list(theirs.shape)}, ours {list(ours.shape)}")
    error, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
    if not largest:
        raise RunError(f"every feature of {len(images)} images is 0: the backbone has collapsed, and nothing is proved")
    return error, error / largest


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

    options = {} if run.model.backbone in model_card.IN_TIMM_TOO else run.model.options
    net = timm.create_model(run.model.backbone, pretrained=False, num_classes=0, **options)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def _write_safetensors(run: Run, backbone: Backbone, images: Tensor, path: Path) -> None:
    weights.write(Weights.of(backbone, run.model), path, method=run.method.name)


def _read_safetensors(run: Run, path: Path) -> Features:
    return load(path)


def load(path: Path | str) -> Backbone:
    """The backbone in a file of the format safetensors, by what the file says alone, in evaluation mode."""
    found = weights.read(path)
    net = backbones.build(found.model.backbone, found.model.stem, found.model.sobel, **found.model.options)
    net.load_state_dict(found.state)
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
