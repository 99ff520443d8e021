"""Relative position: where does a second patch lie, seen from the first?

    L = -log softmax(F(Phi(x_centre), Phi(x_y)))_y,    y one of the eight places around the centre

A 3x3 grid of patches with gaps lies at a random place of the image; each patch is moved by a few pixels more, so that
lines do not continue from one into the next. So that neither chromatic aberration nor fine texture tells, colour is
taken away and some patches are sampled down and up again. Phi is one backbone for both patches.

Carl Doersch, Abhinav Gupta, Alexei A. Efros: Unsupervised Visual Representation Learning by Context Prediction.
ICCV 2015, section 3. https://arxiv.org/abs/1505.05192

BatchNorm: both patches of all pairs of the global batch go through the backbone at once, so its statistics are of 2B
patches and one pair's share in them is 1/B; no more than this passes between the patches of a pair. The paper's network
kept BatchNorm without scale and shift in training, and took it out afterwards.

Deviations: one pair an image and step; the whole grid has to fit, so the short side is 400 to 580 px, where the paper
has images of 150,000 to 450,000 pixels, 335 to 580 px at 4:3; Phi ends in the backbone's pooled features, not in a
layer of 4096; F's hidden layers have BatchNorms. The paper says that some patches are sampled down, not how many, nor
how the size is chosen: here a third, to a side that is log-uniform.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor

from distssl import method
from distssl.data import patches, pixels
from distssl.nn import heads, losses, noise

PLACES = 8  # around the centre, in reading order
SEED_BITS = 24  # of a draw


class Grid(BaseModel):
    """Nine patches with gaps, and the size of the image they lie in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch_px: int = Field(default=96, ge=4)
    gap_px: int = Field(default=48, ge=0)
    jitter_px: int = Field(default=7, ge=0, description="each patch moves by up to this, both ways")
    resize_px: tuple[int, int] = Field(default=(400, 580), description="range of the image's short side")

    @property
    def side_px(self) -> int:
        """Of a square that holds the grid wherever its patches move."""
        return 3 * self.patch_px + 2 * self.gap_px + 2 * self.jitter_px

    @model_validator(mode="after")
    def _fits(self) -> Grid:
        low, high = self.resize_px
        if not self.side_px <= low <= high:
            raise ValueError(f"resize_px={[low, high]} must ascend from at least {self.side_px}, the grid's side")
        return self


class Config(method.Options):
    """The paper's values."""

    grid: Grid = Grid()
    colour: Literal["drop", "project", "none"] = Field(
        default="drop", description="two channels become noise; green against magenta is taken out"
    )
    sample_down: float = Field(default=1 / 3, ge=0, le=1, description="share of patches")
    sample_down_pixels: PositiveInt = Field(default=100, description="fewest pixels in a patch sampled down")
    hidden: tuple[PositiveInt, ...] = (4096, 4096)

    small: ClassVar = {
        "grid": {"patch_px": 10, "gap_px": 3, "jitter_px": 1, "resize_px": [40, 48]},
        "sample_down": 0.5,
        "sample_down_pixels": 16,
        "hidden": [32],
    }

    @model_validator(mode="after")
    def _goes_down(self) -> Config:
        if self.sample_down_pixels > self.grid.patch_px**2:
            raise ValueError(
                f"sample_down_pixels={self.sample_down_pixels} must be at most {self.grid.patch_px**2}, a patch's"
            )
        return self


class RelativePosition(method.Method):
    Config = Config

    def build(self) -> None:
        self.classifier = heads.mlp([2 * self.backbone.num_features, *self.cfg.hidden, PLACES])

    @classmethod
    def view_size_px(cls, cfg: Config) -> int:
        return cfg.grid.side_px

    @classmethod
    def views(cls, cfg: Config, sample: Any) -> dict[str, Any]:
        draws, place = sample.draws, sample.draws.integer(PLACES)
        square = patches.random_square(sample, cfg.grid.resize_px, cfg.grid.side_px)
        centre = _patch(square, draws, cfg, 1, 1)
        cell = cell_of(place)
        other = _patch(square, draws, cfg, cell // 3, cell - 3 * (cell // 3))
        views = {"pair": patches.below(centre, other), "place": place}
        if cfg.colour == "drop":
            views["kept"] = patches.vector(draws.integer(3) for _ in range(2))  # channel of each patch
            views["seeds"] = patches.vector(draws.integer(2**SEED_BITS) for _ in range(4))
        return views

    def loss(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        pair = self._pair(views).to(next(self.parameters()).dtype)  # [N, 2, 3, t, t]
        features = self.backbone(pair.flatten(0, 1)).unflatten(0, pair.shape[:2])  # [N, 2, D]
        return losses.classification(self.classifier(features.flatten(1)), views["place"].long())

    def picture(self, views: dict[str, Tensor]) -> list[Tensor]:
        """Both patches as the network sees them, the first in the centre and the second where it belongs."""
        pair = self._pair(views)
        grid = pair.new_zeros(len(pair), 9, *pair.shape[2:])
        grid[:, 4] = pair[:, 0]
        grid[torch.arange(len(pair)), cell_of(views["place"].long())] = pair[:, 1]
        return [patches.laid_out(grid, 3)]

    def _pair(self, views: dict[str, Tensor]) -> Tensor:
        """float32 [N, 2, 3, t, t], normalised, without colour."""
        pair = patches.unstack(views["pair"], 2)
        if self.cfg.colour == "drop":
            return drop(pixels.normalised(pair / 255), views["kept"].long(), views["seeds"])
        return pixels.normalised((project(pair) if self.cfg.colour == "project" else pair) / 255)


def cell_of(place: Any) -> Any:
    """0..7 around the centre -> 0..8 of the grid, both in reading order."""
    return place + (place >= PLACES // 2) * 1


def drop(pair: Tensor, kept: Tensor, seeds: Tensor) -> Tensor:
    """[N, P, 3, t, t] with two channels of each patch replaced by noise of 1/100 of the third's deviation.

    kept: int64 [N, P], the channel that stays. seeds: integers [N, 2 P].
    """
    num, count, _, height, width = pair.shape
    normal = noise.normal(seeds.reshape(num * count, 2), (3, height, width)).unflatten(0, (num, count))
    stays = (torch.arange(3, device=pair.device) == kept[..., None])[..., None, None]  # [N, P, 3, 1, 1]
    deviation = pair.std(dim=(3, 4), correction=0, keepdim=True).where(stays, 0).sum(2, keepdim=True)
    return pair.where(stays, deviation / 100 * normal)


def project(pair: Tensor) -> Tensor:
    """[N, P, 3, t, t] in 0..255 without its part along green against magenta, a = [-1, 2, -1]; float32.

    B = I - a'a / (aa'), section 3.1.
    """
    a = torch.tensor([-1.0, 2.0, -1.0], device=pair.device)
    across = torch.eye(3, device=pair.device) - torch.outer(a, a) / (a @ a)
    return torch.einsum("ij,npjhw->npihw", across, pair.float())


def _patch(square: Any, draws: Any, cfg: Config, row: Any, column: Any) -> Any:
    """The patch of a cell of the grid; rows and columns 0, 1, 2."""
    size_px, step_px = cfg.grid.patch_px, cfg.grid.patch_px + cfg.grid.gap_px
    top, left = draws.integer(2 * cfg.grid.jitter_px + 1), draws.integer(2 * cfg.grid.jitter_px + 1)
    patch = patches.cut(square, row * step_px + top, column * step_px + left, size_px)
    return patches.down_and_up(patch, draws, cfg.sample_down, cfg.sample_down_pixels**0.5, size_px)
