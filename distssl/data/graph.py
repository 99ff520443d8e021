"""One DALI pipeline from encoded bytes and draws to named views, the same on the CPU and the GPU."""

# DALI's type stubs lack its enums and know no pipeline without a GPU.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportPrivateImportUsage=false

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, tensors, types

from distssl.data import draws
from distssl.data.sample import Sample


class Feed(NamedTuple):
    """One batch for a graph."""

    epoch: int | np.ndarray  # of all, or int64 [N]
    ids: np.ndarray  # int64 [N]
    labels: np.ndarray  # int64 [N]
    encoded: list[bytes]  # N images
    targets: list[bytes] | None = None  # N PNGs, masks or depth maps, for views that read them


Views = Callable[[Sample], dict[str, Any]]


@dataclass(frozen=True)
class Traced:
    """A pipeline that is not built yet, so that one for a GPU can be looked at where there is none."""

    pipeline: Any
    names: tuple[str, ...]
    num_draws: int  # columns a sample needs


def trace(
    views: Views,
    source: Callable[[], tuple[Any, ...]],
    *,
    backend: str,
    batch_size: int = 1,
    threads: int = 1,
    prefetch: int = 1,
    device_id: int | None = None,
    target: str | None = None,
) -> Traced:
    """Run `views` once to see its operators. backend: "cpu" or "gpu".

    source: gives encoded bytes, draws float32 [N, num_draws], ids int64 [N], labels int64 [N] and, with a
    `target` ("mask" or "depth"), those encoded, for each batch.
    """
    names: list[str] = []
    num_draws = 0
    num_inputs = 4 if target is None else 5

    @pipeline_def(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
    )
    def define() -> tuple[Any, ...]:
        nonlocal num_draws
        encoded, columns, ids, labels, *targets = fn.external_source(
            source=source,
            num_outputs=num_inputs,
            batch=True,
            dtype=[types.UINT8, types.FLOAT, types.INT64, types.INT64, types.UINT8][:num_inputs],
            ndim=[1, 1, 0, 0, 1][:num_inputs],
        )
        sample = Sample(encoded, draws.Draws(columns), ids, labels, backend, target=targets[0] if targets else None)
        outputs = {"id": ids, "label": labels, **views(sample)}
        names[:] = outputs.keys()
        num_draws = sample.draws.num_taken
        return tuple(outputs.values())

    return Traced(define(), tuple(names), num_draws)


class Graph:
    """A built pipeline and the names of its outputs.

    views: Sample -> {name: DataNode}; "id" and "label" are added. source: called for each batch, raises
    StopIteration at the end. seed: of the draws. device: where the views land.
    """

    def __init__(
        self,
        views: Views,
        source: Callable[[], Feed],
        *,
        seed: int,
        batch_size: int,
        threads: int,
        prefetch: int,
        device: torch.device,
        target: str | None = None,
    ) -> None:
        def inputs() -> tuple[Any, ...]:
            feed = source()
            columns = draws.uniforms(seed, feed.epoch, feed.ids, max(1, self.traced.num_draws))
            given = _listed(feed.encoded), columns, feed.ids, feed.labels
            return (*given, _listed(feed.targets)) if feed.targets is not None else given

        on_gpu = device.type == "cuda"
        self.traced = trace(
            views,
            inputs,
            backend="gpu" if on_gpu else "cpu",
            batch_size=batch_size,
            threads=threads,
            prefetch=prefetch,
            device_id=device.index or 0 if on_gpu else None,
            target=target,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The external source node")  # a graph need not use its draws
            self.traced.pipeline.build()

    def run(self) -> dict[str, torch.Tensor]:
        """The next batch: images NCHW (channels_last in memory), everything else as the graph made it.

        Raises StopIteration at the end of the source and RuntimeError where a sample cannot be decoded; the batch is
        then lost and the next call goes on with the one after it.
        """
        outputs = self.traced.pipeline.run()
        return {name: _tensor(out) for name, out in zip(self.traced.names, outputs, strict=True)}


def _listed(encoded: list[bytes]) -> Any:
    """One list made here is a third of the time of DALI's own look at each array."""
    return tensors.TensorListCPU([tensors.TensorCPU(data) for data in encoded])


def _tensor(batch: Any) -> torch.Tensor:
    tensor = torch.from_dlpack(batch.as_tensor())
    return tensor.permute(0, 3, 1, 2) if batch.layout() == "HWC" else tensor
