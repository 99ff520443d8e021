"""What a view graph starts from: one encoded image, its draws, its id and label."""

# DALI's type stubs lack its enums and know no pipeline without a GPU.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from nvidia.dali import fn, types

from distssl.data.draws import Draws


@dataclass(frozen=True)
class Sample:
    """One image on its way into views; every field is a DataNode but `draws` and `device`."""

    encoded: Any  # uint8 [bytes]
    draws: Draws
    id: Any  # int64 scalar
    label: Any  # int64 scalar, -1 where there is none
    device: str  # "cpu" or "gpu": where images are
    pixels: Any = None  # the image, where it is decoded once for several views
    target: Any = None  # uint8 [bytes], the mask or the depth map, for views that read one

    def decoded(self) -> Sample:
        """The same sample, decoded here and once: regions are then cut from its pixels."""
        return self if self.pixels is not None else dataclasses.replace(self, pixels=self.whole())

    def size(self) -> tuple[Any, Any]:
        """Height and width in pixels, float32 scalars, from the image's header."""
        shape = fn.peek_image_shape(self.encoded)
        return fn.cast(shape[0], dtype=types.FLOAT), fn.cast(shape[1], dtype=types.FLOAT)

    def whole(self) -> Any:
        """The image, uint8 [H, W, 3]."""
        if self.pixels is not None:
            return self.pixels
        return fn.decoders.image(self.encoded, device=self._decoder(), output_type=types.RGB)

    def classes(self) -> Any:
        """The mask, the class of each of the image's pixels: uint8 [H, W, 1]."""
        return fn.decoders.image(self.target, device=self._decoder(), output_type=types.GRAY)

    def depth(self) -> Any:
        """The depth map in millimetres, 0 where it is not known: uint16 [H, W, 1]."""
        return fn.decoders.image(self.target, device=self._decoder(), output_type=types.GRAY, dtype=types.UINT16)

    def region(self, top: Any, left: Any, height: Any, width: Any) -> Any:
        """A region of the image alone, uint8 [height, width, 3]; the arguments are float32 scalars in pixels."""
        place = {"normalized_anchor": False, "normalized_shape": False, "axis_names": "HW"}
        anchor, shape = fn.stack(top, left), fn.stack(height, width)
        if self.pixels is not None:
            return fn.slice(self.pixels, anchor, shape, **place)
        return fn.decoders.image_slice(
            self.encoded, anchor, shape, device=self._decoder(), output_type=types.RGB, **place
        )

    def _decoder(self) -> str:
        return "mixed" if self.device == "gpu" else "cpu"
