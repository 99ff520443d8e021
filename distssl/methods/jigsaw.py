"""Jigsaw: in which of K orders were the nine tiles of the image handed over?

    L = -log softmax(F(Phi(x_s(1)), ..., Phi(x_s(9))))_s,    s one of K permutations that are far apart        (eq. 3)

Phi is one backbone for all tiles, F a perceptron on their features side by side in the order s. A tile lies anywhere in
its cell of the image, so that edges do not continue from one into the next, and is standardised by itself, each channel
to mean 0 and deviation 1; most images are grey, so that chromatic aberration does not tell.

Mehdi Noroozi, Paolo Favaro: Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles. ECCV 2016.
https://arxiv.org/abs/1603.09246

Deviations: sizes and the share of grey images are those of Alexander Kolesnikov, Xiaohua Zhai, Lucas Beyer: Revisiting
Self-Supervised Visual Representation Learning, CVPR 2019, https://arxiv.org/abs/1901.09005 (the paper has cells of 75
px in a crop of 225, and shifts colour channels); Phi ends in the backbone's pooled features, without a layer of 512 for
each tile; F's hidden layer has a BatchNorm in place of dropout; the order is put on features, not on tiles, which is
the same.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from distssl import method
from distssl.data import augment, patches, pixels
from distssl.data.augment import Crop
from distssl.nn import heads, losses, permutations


class Square(Crop):
    """The square that is cut into cells, which evaluation sees whole; the paper does not flip it."""

    resize_px: int = Field(default=292, ge=8, description="of the short side")
    size_px: int = Field(default=255, ge=8)
    flip: float = Field(default=0.0, ge=0, le=1)


class Config(method.Options):
    """The paper's number of permutations, Kolesnikov's sizes."""

    permutations: int = Field(default=1000, ge=2, description="K, the classes")
    grid: int = Field(default=3, ge=2, le=3, description="tiles on a side")
    tile_px: int = Field(default=64, ge=4)
    grey: float = Field(default=0.66, ge=0, le=1)
    hidden: PositiveInt = 4096
    augment: Square = Square()

    small: ClassVar = {
        "permutations": 10,
        "tile_px": 8,
        "grey": 0.5,
        "hidden": 32,
        "augment": {"resize_px": 36, "size_px": 33, "flip": 0.5},
    }

    @property
    def cell_px(self) -> int:
        return self.augment.size_px // self.grid

    @property
    def room_px(self) -> int:
        """By how much a tile may lie further right or down in its cell."""
        return self.cell_px - self.tile_px

    @model_validator(mode="after")
    def _tiles_fit(self) -> Config:
        if self.tile_px > self.cell_px:
            raise ValueError(f"tile_px={self.tile_px} must be at most augment.size_px / grid, {self.cell_px}")
        return self


class Jigsaw(method.Method):
    Config = Config
    permutations: Tensor

    def build(self) -> None:
        num_tiles = self.cfg.grid**2
        chosen = permutations.far_apart(self.cfg.permutations, num_tiles)
        # In checkpoints, because they are what the classes mean.
        self.register_buffer("permutations", torch.tensor(chosen, dtype=torch.int64))  # [K, P]
        widths = [num_tiles * self.backbone.num_features, self.cfg.hidden, self.cfg.permutations]
        self.classifier = heads.mlp(widths)

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        draws = sample.draws
        image = augment.grey(augment.crop(sample, cfg.augment), draws, cfg.grey)
        image = augment.flip(image, draws.coin(cfg.augment.flip))
        corners = []
        for i in range(cfg.grid**2):
            row, column = divmod(i, cfg.grid)
            top, left = draws.integer(cfg.room_px + 1), draws.integer(cfg.room_px + 1)
            corners.append((row * cfg.cell_px + top, column * cfg.cell_px + left))
        return {"tiles": patches.stack(image, corners, cfg.tile_px), "order": draws.integer(cfg.permutations)}

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = views["order"].long()  # [N]
        tiles = standardise(self._tiles(views)).to(next(self.parameters()).dtype)  # [N, P, 3, t, t]
        features = self.backbone(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])  # [N, P, D]
        features = in_order(features, self.permutations[labels])
        return losses.classification(self.classifier(features.flatten(1)), labels)

    def picture(self, views: dict[str, Tensor]) -> list[Tensor]:
        """The tiles laid out in the order the network has to name, and where they belong."""
        tiles = pixels.normalised(self._tiles(views) / 255)
        asked = in_order(tiles, self.permutations[views["order"].long()])
        return [patches.laid_out(asked, self.cfg.grid), patches.laid_out(tiles, self.cfg.grid)]

    def _tiles(self, views: dict[str, Tensor]) -> Tensor:
        """uint8 [N, P, 3, t, t], in their places."""
        return patches.unstack(views["tiles"], self.cfg.grid**2)


def standardise(tiles: Tensor) -> Tensor:
    """uint8 [N, P, C, t, t] -> float32 with mean 0 and deviation 1 in each channel of each tile.

    The deviation is taken as at least one grey level, so that an even tile stays 0 instead of becoming noise.
    """
    tiles = tiles.float()
    deviation, mean = torch.std_mean(tiles, dim=(3, 4), correction=0, keepdim=True)
    return (tiles - mean) / deviation.clamp_min(1.0)


def in_order(items: Tensor, orders: Tensor) -> Tensor:
    """[N, P, ...] and permutations int64 [N, P] -> [N, P, ...]: item orders[n, i] of sample n comes to place i."""
    return items[torch.arange(len(items), device=items.device)[:, None], orders]
