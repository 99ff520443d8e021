"""Square windows of an image, its mask or depth map in the same pixels, and where its boxes and points come to lie.

A window may reach beyond the image: there pixels are grey, masks have no class and depth is not known. Resampling is
the same in both directions, so shapes keep their aspect. The window is a view itself, its *frame*, with which boxes
and points are moved in torch.
"""

# DALI's type stubs lack its enums and know no pipeline without a GPU.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false
# pyright: reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from typing import Any

from nvidia.dali import fn, math, types

from distssl.data.sample import Sample

GREY = 124  # about the mean of MEAN: near 0 once normalised


class Window:
    """A square of side x side pixels of the image at (left, top), turned into size_px x size_px; DataNodes all."""

    def __init__(self, sample: Sample, size_px: int, top: Any, left: Any, side: Any, mirror: Any) -> None:
        self.sample, self.size_px = sample, size_px
        # Whole pixels, so that an image and its mask are cut at the same places.
        self.top, self.left, self.side = math.floor(top), math.floor(left), math.floor(side)
        self.mirror = fn.cast(mirror, dtype=types.INT32)

    @classmethod
    def whole(cls, sample: Sample, size_px: int) -> Window:
        """The smallest that holds all of the image, in its middle."""
        height, width = sample.size()
        side = math.max(height, width)
        return cls(sample, size_px, (height - side) / 2.0, (width - side) / 2.0, side, 0)

    @classmethod
    def drawn(cls, sample: Sample, size_px: int, share: tuple[float, float], flip: float) -> Window:
        """One whose side is a random share of the image's longer side, as much within the image as it can be."""
        draws = sample.draws
        height, width = sample.size()
        side = math.max(1.0, math.floor(draws.uniform(*share) * math.max(height, width)))
        top, left = (height - side) * draws.unit(), (width - side) * draws.unit()
        return cls(sample, size_px, top, left, side, draws.coin(flip))

    def image(self) -> Any:
        """uint8 [size_px, size_px, 3]."""
        cut = self._cut(self.sample.whole(), GREY)
        return self._mirrored(fn.resize(cut, size=(self.size_px, self.size_px), antialias=True))

    def classes(self) -> Any:
        """The mask: uint8 [size_px, size_px, 1], 255 where there is no class."""
        return self._nearest(self.sample.classes(), 255)

    def depth(self) -> Any:
        """The depth map in millimetres: int32 [size_px, size_px, 1], 0 where it is not known."""
        return fn.cast(self._nearest(self.sample.depth(), 0), dtype=types.INT32)

    def frame(self) -> Any:
        """float32 [5]: left, top and side in the image's pixels, the scale from them to the view's, 1 if mirrored."""
        mirror = fn.cast(self.mirror, dtype=types.FLOAT)
        return fn.stack(self.left, self.top, self.side, float(self.size_px) / self.side, mirror)

    def _nearest(self, pixels: Any, fill: int) -> Any:
        cut = self._cut(pixels, fill)
        return self._mirrored(fn.resize(cut, size=(self.size_px, self.size_px), interp_type=types.INTERP_NN))

    def _cut(self, pixels: Any, fill: int) -> Any:
        anchor, shape = fn.stack(self.top, self.left), fn.stack(self.side, self.side)
        return fn.slice(
            pixels,
            anchor,
            shape,
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            out_of_bounds_policy="pad",
            fill_values=float(fill),
        )

    def _mirrored(self, pixels: Any) -> Any:
        return fn.flip(pixels, horizontal=self.mirror)
