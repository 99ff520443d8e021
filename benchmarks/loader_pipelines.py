"""The pipelines that loader.py compares, and what a child process measures of one."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # two views, each float32 [N, 3, S, S]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WINDOW_PX = 13  # of everybody's blur: 2 * ceil(3 sigma) + 1 at the largest sigma, 2
OURS = "distssl"
RECIPES = ("torchvision v2, decode_jpeg", "torchvision v2, PIL decode", "torchvision v2, PIL")
LIGHTLY = "lightly"
RAMP_HW = (533, 400)  # a typical photo of the archive


@dataclasses.dataclass(frozen=True)
class Work:
    """What a child process runs. task: "measure", "statistics", or "geometry" (crop and flip alone, on ramps)."""

    pipeline: str
    folder: str
    passes: int
    threads: int
    size_px: int
    batch_size: int
    task: str = "measure"
    warm_up: bool = False

    @property
    def colour(self) -> float:
        """What the probabilities of jitter, grey and blur are multiplied by."""
        return float(self.task != "geometry")


def ours(work: Work) -> Batches:
    """The product's Loader; samples in a new random order each pass, as in training."""
    from distssl.data import dataset, loader, quarantine
    from distssl.data.augment import Augment
    from distssl.methods.simclr import Config, SimCLR

    on = work.colour
    cfg = Config(augment=Augment(size_px=work.size_px, jitter=0.8 * on, grey=0.2 * on, blur=0.5 * on))
    data = dataset.Dataset.open(work.folder)

    def requests() -> Iterator[loader.Request]:
        num = work.batch_size if work.warm_up else data.num_samples
        for epoch in range(work.passes):
            ids = np.random.default_rng(epoch).permutation(data.num_samples)[:num]
            for start in range(0, num, work.batch_size):
                yield loader.Request(ids[start : start + work.batch_size], epoch)

    built = loader.Loader(
        data,
        functools.partial(SimCLR.views, cfg),
        seed=0,
        batch_size=work.batch_size,
        threads=work.threads,
        max_pixels=1 << 27,
        quarantine=quarantine.Quarantine(),
    )
    return ((batch["a"], batch["b"]) for batch in built.batches(requests()))


def peer(work: Work) -> Batches:
    """webdataset -> two views in a DataLoader's workers, collated there straight into shared memory."""
    from torch.utils.data import DataLoader
    from webdataset.compat import WebDataset

    decode, transform = recipe(work)
    shards = sorted(map(str, Path(work.folder).glob("*.tar"))) * work.passes
    data = (
        WebDataset(shards[: work.threads if work.warm_up else None], shardshuffle=False, empty_check=False)
        .to_tuple("jpg;jpeg;png")
        .map_tuple(decode)
        .map_tuple(transform)
    )
    # WebDataset's stub hides that it is an IterableDataset.
    batches = DataLoader(data, batch_size=work.batch_size, num_workers=work.threads)  # pyright: ignore[reportArgumentType]
    return ((views[0], views[1]) for (views,) in batches)


def recipe(work: Work) -> tuple[Callable, Callable]:
    """(bytes -> image, image -> [view, view]) of a peer."""
    import io

    from PIL import Image
    from torchvision import io as tv_io
    from torchvision.transforms import v2

    def pil(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def tensor(data: bytes) -> torch.Tensor:
        return tv_io.decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), tv_io.ImageReadMode.RGB)

    on = work.colour
    if work.pipeline == LIGHTLY:
        from lightly.transforms.simclr_transform import SimCLRTransform

        return pil, SimCLRTransform(
            input_size=work.size_px, cj_prob=0.8 * on, random_gray_scale=0.2 * on, gaussian_blur=0.5 * on
        )
    crop = v2.RandomResizedCrop(work.size_px, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), antialias=True)
    colour = [
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8 * on),
        v2.RandomGrayscale(0.2 * on),
    ]
    finish = [
        v2.RandomApply([v2.GaussianBlur(WINDOW_PX, (0.1, 2.0))], 0.5 * on),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    # PIL's blur in v2 is the tensor's with two conversions around it, so the image becomes a tensor before it.
    after_pil = [v2.ToImage()] if work.pipeline == RECIPES[2] else []
    view = v2.Compose([crop, *colour, *after_pil, *finish])
    decode = {RECIPES[0]: tensor, RECIPES[1]: lambda data: v2.functional.pil_to_tensor(pil(data)), RECIPES[2]: pil}
    return decode[work.pipeline], lambda image: [view(image), view(image)]


def work_size(folder: str) -> int:
    """Samples of a packed data set."""
    return json.loads((Path(folder) / "dataset.json").read_text())["samples"]


def run_child(work: Work) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make = ours if work.pipeline == OURS else peer
    if work.task != "measure":
        return (_geometry if work.task == "geometry" else _statistics)(make(work))
    for _ in make(dataclasses.replace(work, passes=1, warm_up=True)):
        pass
    cpu, wall, num = _cpu_s(), time.perf_counter(), 0
    for a, b in make(work):
        assert a.shape == b.shape == (len(a), 3, work.size_px, work.size_px)
        assert a.dtype == b.dtype == torch.float32
        num += len(a)
    assert not multiprocessing.active_children(), "a worker's CPU time counts only once it is joined"
    return {"images": num, "cpu_s": _cpu_s() - cpu, "wall_s": time.perf_counter() - wall}


def _cpu_s() -> float:
    """User and system CPU-seconds of this process and of the workers it has joined."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _statistics(batches: Batches) -> dict[str, list[float]]:
    """One value a view: per-channel mean and second moment, grey or not, mean squared luma gradient (0..1 scale)."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    found: dict[str, list[float]] = {}
    for x in (view for pair in batches for view in pair):
        rgb = x * std + mean
        luma = rgb.mean(1)
        spread = (rgb.amax(1) - rgb.amin(1)).flatten(1).amax(1)
        values = {f"mean {c}": x[:, i].mean((1, 2)) for i, c in enumerate("RGB")}
        values |= {f"square {c}": x[:, i].square().mean((1, 2)) for i, c in enumerate("RGB")}
        values["grey"] = (spread < 1.5 / 255).float()
        values["gradient energy"] = luma.diff(dim=1).square().mean((1, 2)) + luma.diff(dim=2).square().mean((1, 2))
        for name, value in values.items():
            found.setdefault(name, []).extend(value.tolist())
    return found


def _geometry(batches: Batches) -> dict[str, list[float]]:
    """Crop area, aspect and flip of each view, read off images whose red is x and whose green is y."""
    found: dict[str, list[float]] = {"crop area": [], "log aspect": [], "flipped": []}
    for x in (view for pair in batches for view in pair):
        rgb = x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        size = x.shape[-1]
        low, high = size // 4, 3 * size // 4  # away from the borders, where antialiasing has less to average
        across = (rgb[:, 0, :, high] - rgb[:, 0, :, low]).mean(1) * size / (high - low)
        down = (rgb[:, 1, high] - rgb[:, 1, low]).mean(1) * size / (high - low)
        found["crop area"] += (across.abs() * down).tolist()
        found["log aspect"] += (across.abs() * RAMP_HW[1] / (down * RAMP_HW[0])).log().tolist()
        found["flipped"] += (across < 0).float().tolist()
    return found
