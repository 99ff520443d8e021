from __future__ import annotations

import torch
from torch import Tensor

from distssl import collectives
from distssl.nn.per_sample import PerSample, of_all


def filled(num_samples: int) -> Tensor:
    """Ranks hold unequal parts of the even ids; then each puts two rows, one id on both."""
    rank, world_size = collectives.rank(), collectives.world_size()
    rows = PerSample(2, fill=-1.0)
    even = torch.arange(0, num_samples, 2)
    mine = even[:1] if world_size > 1 and rank == 0 else even[1:] if world_size > 1 else even
    rows.set(mine, mine[:, None] * torch.tensor([1.0, 10.0]), num_samples)
    ids = torch.tensor([[1, 3], [3, 5]])
    values = torch.tensor([[100.0, 101.0], [102.0, 103.0]])[..., None].expand(2, 2, 2)
    here = slice(rank, rank + 1) if world_size > 1 else slice(None)
    rows.put(ids[here].flatten(), values[here].flatten(0, 1))
    before = rows.values.clone()
    rows.turn()
    assert torch.equal(before[1::2], torch.full_like(before[1::2], -1))  # until the turn
    rows.turn()
    return rows.values


def test_rows_are_the_same_on_every_rank_and_at_any_number_of_them(ranks) -> None:
    expected = torch.full((8, 2), -1.0)
    expected[::2] = torch.arange(0, 8, 2)[:, None] * torch.tensor([1.0, 10.0])
    expected[1], expected[3], expected[5] = 100, 102, 103
    assert torch.equal(filled(8), expected)
    for of_rank in ranks(2).run(filled, 8):
        assert torch.equal(of_rank, expected)


def test_the_size_comes_with_a_state_dict() -> None:
    rows = PerSample(3, fill=-1, dtype=torch.int64)
    rows.set(torch.tensor([1]), torch.tensor([[7, 8, 9]]), 4)
    fresh = PerSample(3, fill=-1, dtype=torch.int64)
    fresh.load_state_dict(rows.state_dict())
    assert fresh.values.tolist() == [[-1] * 3, [7, 8, 9], [-1] * 3, [-1] * 3]


def unequal() -> Tensor:
    return of_all(torch.arange(2 * collectives.rank()).double() + 10)


def test_rows_of_all_ranks_may_be_of_any_number_none_included(ranks) -> None:
    for of_rank in ranks(2).run(unequal):
        assert of_rank.tolist() == [10, 11]
    assert of_all(torch.empty(0, 4)).shape == (0, 4)
