"""Supervised training from scratch on the labels that the probes get: what pretraining has to beat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from contestants import Settings, backbone, placed, set_rate
from photos import SIZE_PX, Photos, extract
from recipes import CROP_AREA
from stopwatch import Say
from torch import nn

from distssl.context import Context
from distssl.data import augment, loader, quarantine
from distssl.data.sample import Sample
from distssl.data.shards import Dataset
from distssl.downstream import labels as label_sets
from distssl.nn import optim, precision
from distssl.nn.backbones import Backbone

STEPS = {100: 200, 1000: 400, None: 600}  # by labels, whatever the pretraining takes
BATCH = 128
LR, WEIGHT_DECAY = 1e-3, 0.05


def accuracy(
    settings: Settings,
    photos: Photos,
    out: Path,
    seed: int,
    *,
    data: str,
    labels: int | None,
    ids: np.ndarray | None = None,
) -> float:
    """Test accuracy of the backbone and a linear layer trained on labels alone, with the same crops and flips.

    ids: the labelled images, int64 ascending, where they are others than the probes get.
    """
    precision.speed_up_float32_matmul()
    dtype = precision.resolve("auto", "cpu")
    dataset = Dataset.open(photos.splits[data].train)
    if ids is None:
        every = dataset.ids_with("label")
        ids = every if labels is None else label_sets.subset(every, labels, seed)
    batch = min(BATCH, len(ids))
    steps = STEPS[labels]
    torch.manual_seed(seed)
    trunk = backbone(settings)
    head = nn.Linear(trunk.num_features, len(dataset.classes))
    net = placed(nn.Sequential(trunk, head))
    optimizer = optim.build(net, name="adamw", lr=LR, weight_decay=WEIGHT_DECAY)
    source = loader.Loader(
        dataset,
        _crop_and_flip,
        seed=seed,
        batch_size=batch,
        threads=settings.threads,
        max_pixels=50_000_000,
        quarantine=quarantine.Quarantine(),
    )
    say = Say(f"supervised {data} {labels or 'all'}", steps, batch)
    net.train()
    for step, views in enumerate(source.batches(_requests(ids, batch, steps, seed))):
        set_rate(optimizer, step, LR, steps)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(net(views["image"]), views["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        say.line(step + 1, loss)
    return of_classifier(trunk, head, photos, out, settings, data)


def of_classifier(trunk: Backbone, head: nn.Linear, photos: Photos, out: Path, settings: Settings, data: str) -> float:
    """Test accuracy of a linear layer on a backbone."""
    dtype = precision.resolve("auto", "cpu")
    test = extract(trunk, photos.splits[data].test, Context(out), settings.threads, dtype)
    with torch.no_grad():
        logits = head(torch.from_numpy(test.all()))  # [N, K]
    return float((logits.argmax(1).numpy() == test.labels).mean())


def _requests(ids: np.ndarray, batch: int, steps: int, seed: int) -> Iterator[loader.Request]:
    per_epoch = len(ids) // batch
    for step in range(steps):
        epoch, nth = divmod(step, per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(ids)
        yield loader.Request(order[nth * batch : (nth + 1) * batch], epoch)


def _crop_and_flip(sample: Sample) -> dict[str, Any]:
    image = augment.random_resized_crop(sample, SIZE_PX, CROP_AREA, (3 / 4, 4 / 3))
    return {"image": augment.normalise(image, mirror=sample.draws.coin(0.5))}
