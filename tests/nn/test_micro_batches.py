"""A batch seen part by part: the gradient of the whole, and a BatchNorm that has seen each part once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from distssl.nn import losses
from distssl.nn.micro_batches import MicroBatches

LANE_ROWS, NUM_LANES, NUM = 6, 2, 3


def net(norm: bool) -> nn.Sequential:
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(5)] if norm else []
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), *middle, nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3)
    ).double()


def images() -> Tensor:
    return torch.randn(2 * NUM_LANES * LANE_ROWS, 3, 8, 8, dtype=torch.float64)  # two views


def gradients(model: nn.Module, outputs: Tensor) -> list[Tensor]:
    """Of a loss in which every output meets every other one."""
    return list(torch.autograd.grad(losses.nt_xent(*outputs.chunk(2), temperature=0.2), list(model.parameters())))


def test_without_statistics_of_the_batch_the_gradient_is_that_of_the_batch_at_once() -> None:
    model = net(norm=False).eval()  # no dropout
    x = images()
    outputs = MicroBatches(LANE_ROWS, NUM).run(model, model, x)
    torch.testing.assert_close(outputs, model(x))
    torch.testing.assert_close(gradients(model, outputs), gradients(model, model(x)), rtol=1e-10, atol=1e-14)


def test_statistics_are_a_parts_and_move_once_and_dropout_is_the_same_in_the_repetition() -> None:
    model, plain = net(norm=True), net(norm=True)
    x, micro = images(), MicroBatches(LANE_ROWS, NUM)
    rows = torch.arange(len(x)) % LANE_ROWS // (LANE_ROWS // NUM)  # the part of each row
    torch.manual_seed(1)
    expected = torch.empty(len(x), 20, dtype=torch.float64)
    for nth in range(NUM):
        expected[rows == nth] = plain(x[rows == nth])
    torch.manual_seed(1)
    outputs = micro.run(model, model, x)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients(model, outputs), gradients(plain, expected), rtol=1e-10, atol=1e-14)
    assert_same_buffers(model, plain)
    assert plain.get_buffer("1.num_batches_tracked") == NUM


def test_a_teacher_without_gradient_sees_the_same_parts() -> None:
    model, x = net(norm=True), images()
    teacher = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = MicroBatches(LANE_ROWS, NUM).run(model, model, x)
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(MicroBatches(LANE_ROWS, NUM).run(teacher, teacher, x), expected)
    assert_same_buffers(teacher, model)


def assert_same_buffers(a: nn.Module, b: nn.Module) -> None:
    for (name, mine), theirs in zip(a.named_buffers(), b.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_part_holds_the_same_images_at_any_number_of_ranks(world_size: int) -> None:
    micro, lanes = MicroBatches(LANE_ROWS, NUM), 4
    ids = torch.arange(lanes * LANE_ROWS)
    for nth in range(NUM):
        of_ranks = [micro.part(mine, nth) for mine in ids.chunk(world_size)]
        assert torch.equal(torch.cat(of_ranks), micro.part(ids, nth))


def test_no_activation_is_kept_between_the_passes() -> None:
    def kept(micro: MicroBatches | None) -> int:
        """Bytes that the graph holds beside the images."""
        model, x, held = net(norm=True), images(), {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: held.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            _ = micro.run(model, model, x) if micro else model(x)
        return sum(held.values()) - held[x.data_ptr()]

    assert kept(MicroBatches(LANE_ROWS, NUM)) == 0 < kept(None)


def test_rows_that_are_not_whole_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match="x has 7 rows; a multiple of lane_rows=6"):
        MicroBatches(LANE_ROWS, NUM).run(nn.Identity(), nn.Identity(), torch.zeros(7, 3))


def test_in_the_repetition_a_norm_still_counts_its_batches_for_syncbatchnorm_asks_for_that() -> None:
    model, x, seen = net(norm=True), images(), []
    norm = model.get_submodule("1")
    norm.register_forward_pre_hook(lambda module, _: seen.append(module.num_batches_tracked is not None))
    MicroBatches(LANE_ROWS, NUM).run(model, model, x).sum().backward()
    assert seen == [True] * 2 * NUM
    assert model.get_buffer("1.num_batches_tracked") == NUM
