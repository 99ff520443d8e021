"""lightly's SimCLR as its users write it, with the settings of the others.

LightlyDataset over the JPEGs, SimCLRTransform, a DataLoader with workers, SimCLRProjectionHead, NTXentLoss and a plain
PyTorch loop; one forward pass a view, as in lightly's examples.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from contestants import Settings, Trained, backbone, placed, run_of, set_rate
from lightly.data import LightlyDataset
from lightly.loss import NTXentLoss
from lightly.models.modules.heads import SimCLRProjectionHead
from lightly.transforms.simclr_transform import SimCLRTransform
from photos import SIZE_PX, Photos
from recipes import CROP_AREA, JITTER, PROJECTOR, TEMPERATURE
from stopwatch import Clock, Say
from torch import nn

from distssl import atomic, plan
from distssl.data.shards import Dataset
from distssl.nn import optim, precision
from distssl.nn.backbones import Backbone


def train(settings: Settings, photos: Photos, out: Path, seed: int) -> Trained:
    """lightly's SimCLR; goes on from the last whole epoch."""
    saved = out / "runs" / f"lightly_seed{seed}.pt"
    saved.parent.mkdir(parents=True, exist_ok=True)
    started = saved.with_suffix(".started")
    interrupted = started.exists()
    started.touch()
    steps_per_epoch = plan.of_run(
        run_of("simclr", settings, photos, out, seed), Dataset.open(photos.packed), 1
    ).steps_per_epoch
    with Clock() as clock:
        trained = _train(settings, photos.jpegs, saved, seed, steps_per_epoch)
    return Trained.timed(
        trained, settings.epochs * steps_per_epoch, clock, saved.with_suffix(".times.json"), interrupted
    )


def _train(settings: Settings, jpegs: Path, saved: Path, seed: int, steps_per_epoch: int) -> Backbone:
    precision.speed_up_float32_matmul()
    dtype = precision.resolve("auto", "cpu")
    torch.manual_seed(seed)
    trunk = backbone(settings)
    net = nn.Sequential(trunk, SimCLRProjectionHead(trunk.num_features, *PROJECTOR))
    placed(net)
    optimizer = optim.build(net, name="adamw", lr=settings.lr, weight_decay=settings.weight_decay)
    criterion = NTXentLoss(temperature=TEMPERATURE)
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epochs"]
    batches = _batches(settings, jpegs)
    say = Say("lightly", settings.epochs * steps_per_epoch, settings.batch)
    for epoch in range(first, settings.epochs):
        torch.manual_seed(seed * 10_000 + epoch)
        for nth, (views, _, _) in enumerate(itertools.islice(batches, steps_per_epoch)):
            step = epoch * steps_per_epoch + nth
            set_rate(optimizer, step, settings.lr, settings.epochs * steps_per_epoch)
            x0, x1 = (view.to(memory_format=torch.channels_last) for view in views)  # [N, 3, H, W]
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                z0, z1 = net(x0), net(x1)
            loss = criterion(z0.float(), z1.float())  # in float32 as ours: bf16 logits would handicap it
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            say.line(step + 1, loss)
        with atomic.replacing(saved) as part:
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}, part)
    return trunk


def _batches(settings: Settings, jpegs: Path) -> Any:
    transform = SimCLRTransform(
        input_size=SIZE_PX,
        cj_strength=1.0,
        cj_bright=JITTER,
        cj_contrast=JITTER,
        cj_sat=JITTER,
        cj_hue=JITTER / 4,
        min_scale=CROP_AREA[0],
        gaussian_blur=0.0,
    )
    dataset: Any = LightlyDataset(str(jpegs), transform=transform)  # pyright: ignore[reportArgumentType]
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=settings.batch,
        shuffle=True,
        drop_last=True,
        num_workers=settings.threads,
        persistent_workers=True,
    )
