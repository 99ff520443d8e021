"""Teachers, queues and whitening: their closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distssl import collectives
from distssl.nn import teacher
from distssl.nn.queue import Queue
from distssl.nn.teacher import Teacher
from distssl.nn.whitening import IterNorm


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.996), (0.5, 0.998), (1.0, 1.0)])
def test_byols_momentum_at_the_start_the_middle_and_the_end(progress: float, expected: float) -> None:
    assert teacher.momentum(progress, 0.996) == pytest.approx(expected, abs=1e-12)


def test_a_teacher_is_the_weighted_sum_of_the_students_it_saw_and_gets_no_gradient() -> None:
    student = nn.Linear(3, 2)
    follower = Teacher(student)
    start = student.weight.detach().clone()
    with torch.no_grad():
        student.weight.fill_(1.0)
        follower.follow(student, 0.9)
        student.weight.fill_(2.0)
        follower.follow(student, 0.9)
    torch.testing.assert_close(follower.net.weight, 0.81 * start + 0.09 * 1.0 + 0.1 * 2.0)
    assert not follower(torch.randn(4, 3)).requires_grad
    assert not any(parameter.requires_grad for parameter in follower.parameters())


def rows_after_three_steps(size: int) -> Tensor:
    queue = Queue(size, 1)
    rank, world_size = collectives.rank(), collectives.world_size()
    per_rank = 4 // world_size
    for step in range(3):
        for half in range(2):  # two batches a step
            batch = torch.arange(4.0)[:, None] + 10 * (2 * step + half)
            queue.put(batch[rank * per_rank :][:per_rank])
        queue.turn()
    return queue.rows.flatten()


@pytest.mark.parametrize("size", [0, 6, 10, 30])
def test_a_queue_holds_the_latest_rows_in_one_order_at_any_world_size(ranks, size: int) -> None:
    alone = rows_after_three_steps(size)
    everything = [10.0 * batch + i for batch in range(6) for i in range(4)]
    assert sorted(alone.tolist()) == sorted(([0.0] * 30 + everything)[30 + 24 - size :])
    for of_rank in ranks(2).run(rows_after_three_steps, size):
        assert torch.equal(of_rank, alone)


def test_iterative_normalisation_is_white_within_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8, generator=generator, dtype=torch.float64)
    x = x @ (torch.eye(8, dtype=torch.float64) + 0.3 * torch.randn(8, 8, generator=generator, dtype=torch.float64)) + 3
    norm = IterNorm(8, num_groups=2, iterations=9).double()
    y = norm(x)
    for group in y.split(4, dim=1):
        torch.testing.assert_close(group.T.cov(correction=0), torch.eye(4).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(y.mean(0), torch.zeros(8).double(), rtol=0, atol=1e-9)


def test_five_iterations_are_newtons_on_the_eigenvalues() -> None:
    """On a diagonal covariance the iteration is p <- (3 p - p^3 s) / 2 for each eigenvalue s over the trace."""
    scale = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double()  # white exactly
    got = IterNorm(3, num_groups=1, eps=0.0).double()(corners * scale)
    s = scale.square() / scale.square().sum()
    p = torch.ones(3, dtype=torch.float64)
    for _ in range(5):
        p = (3 * p - p**3 * s) / 2
    torch.testing.assert_close(got, corners * scale * p / scale.square().sum().sqrt())


def whitened(rows: int) -> tuple[Tensor, Tensor]:
    x = torch.linspace(-3, 3, rows * 4, dtype=torch.float64).reshape(rows, 4)
    x = (x + x.flip(1) * x.sin()).requires_grad_()
    per_rank = rows // collectives.world_size()
    first = collectives.rank() * per_rank
    y = IterNorm(4, num_groups=2).double()(x[first : first + per_rank])
    (y.pow(3).sum() / per_rank).backward()
    assert x.grad is not None
    return y.detach(), collectives.sum_(x.grad) / collectives.world_size()


def test_iterative_normalisation_is_over_the_global_batch(ranks) -> None:
    y, grad = whitened(12)
    results = ranks(2).run(whitened, 12)
    torch.testing.assert_close(torch.cat([part for part, _ in results]), y)
    for _, grad_of_rank in results:
        torch.testing.assert_close(grad_of_rank, grad)


def test_iterative_normalisation_in_evaluation_follows_the_running_whitening() -> None:
    norm = IterNorm(4, num_groups=2, momentum=1.0).double()
    x = torch.randn(64, 4, dtype=torch.float64)
    trained = norm(x)
    torch.testing.assert_close(norm.eval()(x), trained)
