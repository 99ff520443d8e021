"""The graph: tensors as torch wants them, and a kernel on the GPU for every operator without having one."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import backend, fn, types

from distssl import method
from distssl.data import augment, graph
from distssl.data.sample import Sample
from tests import planted

REGISTERED = {
    "cpu": set(backend.RegisteredCPUOps()),
    "gpu": set(backend.RegisteredGPUOps()),
    "mixed": set(backend.RegisteredMixedOps()),
}
ON_THE_GPU = {"Resize", "ColorTwist", "ColorSpaceConversion", "GaussianBlur", "CropMirrorNormalize"}


def no_source() -> tuple[Any, ...]:
    raise AssertionError("tracing reads no data")


def operators(views: graph.Views, device: str, target: str | None = None) -> list[Any]:
    """The operators of a traced graph that was never built."""
    traced = graph.trace(views, no_source, backend=device, target=target)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The external source node")
        traced.pipeline._build_graph()
    return traced.pipeline._ops


def evaluation(sample: Sample) -> dict[str, Any]:
    return {"image": augment.normalise(augment.centre_crop(sample, 32, 36))}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("name", [*method.names(), "evaluation", "mask", "depth"])
def test_every_operator_has_a_kernel_where_it_runs(name: str, device: str) -> None:
    def views(sample: Sample) -> dict[str, Any]:
        if name == "evaluation":
            return evaluation(sample)
        if name in ("mask", "depth"):
            return {"target": sample.classes() if name == "mask" else sample.depth()}
        found = method.find(name)
        return found.views(found.Config(), sample)

    found = operators(views, device, name if name in ("mask", "depth") else None)
    names = [op._op.schema.Name() for op in found]
    for operator, op in zip(names, found, strict=True):
        assert operator in REGISTERED[op._op.device], (operator, op._op.device)
        if op._op.device == "cpu":
            assert {node.device for node in op.inputs} <= {"cpu"}, operator
    if device == "gpu":
        decoders = [(name, op._op.device) for name, op in zip(names, found, strict=True) if name.startswith("decoders")]
        assert decoders
        assert {where for _, where in decoders} == {"mixed"}
        on_cpu = {name for name, op in zip(names, found, strict=True) if op._op.device == "cpu"}
        assert not on_cpu & ON_THE_GPU


def test_a_graph_says_how_many_draws_it_takes() -> None:
    def views(sample: Sample) -> dict[str, Any]:
        return {"a": sample.draws.unit(), "b": sample.draws.coin(0.5), "c": sample.draws.uniform(0, 1)}

    traced = graph.trace(views, no_source, backend="gpu")
    assert traced.num_draws == 3
    assert traced.names == ("id", "label", "a", "b", "c")


def everything(sample: Sample) -> dict[str, Any]:
    image = augment.centre_crop(sample, 32, 36)
    return {"image": augment.normalise(image), "half": fn.cast(sample.id, dtype=types.FLOAT) / 2.0, "raw": image}


def build(views: graph.Views, feeds: list[graph.Feed], prefetch: int = 2) -> graph.Graph:
    left = iter(feeds)
    device = torch.device("cpu")
    return graph.Graph(views, lambda: next(left), seed=0, batch_size=4, threads=1, prefetch=prefetch, device=device)


def feed(ids: list[int]) -> graph.Feed:
    return graph.Feed(0, np.array(ids), np.array(ids) * 10, [planted.picture(i) for i in ids])


def test_views_are_torch_tensors_with_images_channels_last() -> None:
    got = build(everything, [feed([3, 1, 2])]).run()
    assert list(got) == ["id", "label", "image", "half", "raw"]
    assert got["id"].tolist() == [3, 1, 2]
    assert got["label"].tolist() == [30, 10, 20]
    assert got["half"].tolist() == [1.5, 0.5, 1.0]
    assert got["image"].shape == got["raw"].shape == (3, 3, 32, 32)
    assert got["image"].dtype == torch.float32
    assert got["raw"].dtype == torch.uint8
    assert got["image"].is_contiguous(memory_format=torch.channels_last)


def test_a_batch_that_is_held_is_not_overwritten_by_later_ones() -> None:
    built = build(everything, [feed([i, i + 1]) for i in range(12)])
    held = [built.run() for _ in range(12)]
    with pytest.raises(StopIteration):
        built.run()
    for i, batch in enumerate(held):
        assert batch["id"].tolist() == [i, i + 1]
        alone = build(everything, [feed([i])]).run()
        assert torch.equal(batch["image"][:1], alone["image"])


@pytest.mark.parametrize("prefetch", [1, 2, 3])
def test_a_failed_batch_is_the_only_one_that_is_lost(prefetch: int) -> None:
    feeds = [feed([i, i + 1]) for i in range(9)]
    for i in (0, 3, 4, 8):
        feeds[i].encoded[1] = b"no image"
    built = build(everything, feeds, prefetch)
    seen: list[int | None] = []
    while True:
        try:
            seen.append(int(built.run()["id"][0]))
        except RuntimeError:
            seen.append(None)
        except StopIteration:
            break
    assert seen == [None, 1, 2, None, None, 5, 6, 7, None]
