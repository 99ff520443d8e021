"""The rows that k-means reads, again and again: in memory, on disk, or made on the fly.

Three forms, each this rank's rows alone, and any number of them, none included:

    Tensor [N, D]                          on any device; bfloat16 and float16 are computed with in float32
    np.ndarray [N, D]                      np.memmap too: its pages are given back after each block
    callable, no arguments                 returns an iterator over blocks [n, D], tensor or array, n as it likes; it is
                                           called once a pass and must give the same rows in the same order each time
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from distssl import collectives

T = TypeVar("T")
Source: TypeAlias = "Tensor | np.ndarray | Callable[[], Iterable[Tensor | np.ndarray]]"

BLOCK_BYTES = 16 * 2**20
ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Survey:
    """What one pass over the rows finds. num_rows, squares: of this rank. The rest: of all ranks, the same on each."""

    num_rows: int
    squares: Tensor  # [N], each row's squared length
    first_id: int  # rows on the ranks before this one
    num_all: int
    dim: int
    largest: float  # absolute value
    sum_of_squares: float


class Rows:
    """This rank's rows, block by block."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def blocks(self) -> Iterator[Tensor]:
        """Contiguous blocks [n, D], float32 or float64, each valid until the next."""
        if isinstance(self.source, np.ndarray):
            parts: Iterable[Any] = _slices(self.source)
        else:
            parts = [self.source] if isinstance(self.source, Tensor) else self.source()
        for part in parts:
            block = part.detach() if isinstance(part, Tensor) else torch.from_numpy(_writable(part))
            if block.ndim != 2:
                raise ValueError(f"x has blocks of shape {list(block.shape)}; [n, D] is right")
            yield block.to(torch.promote_types(block.dtype, torch.float32)).contiguous()

    def take(self, positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """The rows at `positions` int64 [P], [P, D], in that order."""
        order = positions.argsort()
        wanted, found, first = positions[order], [], 0
        for block in self.blocks():
            here = wanted[(wanted >= first) & (wanted < first + len(block))] - first
            found.append(block[here.to(block.device)])
            first += len(block)
        rows = torch.cat(found) if found else torch.empty(0, dim, dtype=dtype)
        taken = torch.empty_like(rows)
        taken[order.to(rows.device)] = rows
        return taken


def survey(rows: Rows) -> Survey:
    """Read all rows of all ranks once. Raises ValueError on every rank where a rank's rows cannot be clustered."""
    mine = agree(lambda: _read(rows))
    # A rank without rows takes the others' word for what rows are like.
    found = collectives.gather_objects((mine.num_rows, mine.dim, mine.squares.dtype, mine.largest, mine.sum_of_squares))
    counts, dims, dtypes, maxima, sums = zip(*found, strict=True)
    kinds = {(dim, dtype) for count, dim, dtype in zip(counts, dims, dtypes, strict=True) if count}
    if len(kinds) > 1:
        raise ValueError(f"x has rows of {sorted(map(str, kinds))} (features, type) on the ranks; one kind is right")
    dim, dtype = next(iter(kinds)) if kinds else (max(dims), mine.squares.dtype)
    before = sum(counts[: collectives.rank()])
    return Survey(mine.num_rows, mine.squares.to(dtype), before, sum(counts), dim, max(maxima), sum(sums))


def _read(rows: Rows) -> Survey:
    """The survey of this rank's rows alone."""
    squares, kind, largest, total = Column(), None, 0.0, 0.0
    for block in rows.blocks():
        kind = kind or (block.shape[1], block.dtype)
        if kind != (block.shape[1], block.dtype):
            raise ValueError(f"x has a block of {(block.shape[1], block.dtype)} after {kind} (features, type)")
        for part in block.split(ROWS_AT_ONCE):
            of_part = squared_lengths(part)
            bad = (~of_part.isfinite()).nonzero()
            if len(bad):
                raise ValueError(
                    f"x[{len(squares) + int(bad[0])}] is NaN or infinite, or its square is; finite is right"
                )
            if part.numel():
                largest = max(largest, *(abs(float(end)) for end in part.aminmax()))
            # A float32 sum of many squares would be off by more than the objective may be.
            total += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
            squares.extend(of_part)
    return Survey(len(squares), squares.all(), 0, len(squares), kind[0] if kind else 0, largest, total)


class Column:
    """Numbers that arrive bit by bit, in one piece of memory.

    A list of many small tensors would keep the allocator from using again what large ones in between gave back:
    a gigabyte for 5,000,000 rows.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def extend(self, more: Tensor) -> None:
        end = self.length + len(more)
        if self.values is None or end > len(self.values):
            larger = more.new_empty(max(end, 2 * self.length))
            larger[: self.length] = self.all()
            self.values = larger
        self.values[self.length : end] = more
        self.length = end

    def all(self) -> Tensor:
        return torch.empty(0) if self.values is None else self.values[: self.length]


def squared_lengths(x: Tensor) -> Tensor:
    """[n, D] -> [n]. The norm reads x once and is 3 times as fast as the product with itself."""
    return torch.linalg.vector_norm(x, dim=1).square_()


def agree(check: Callable[[], T]) -> T:
    """`check()` of this rank. Where it raises ValueError on any rank, every rank does: none is left waiting."""
    outcome: list[T] = []
    message = ""
    try:
        outcome.append(check())
    except ValueError as error:
        message = str(error)
    messages = collectives.gather_objects(message)
    if any(messages):
        if len(messages) > 1:
            messages = [f"rank {rank}: {text}" for rank, text in enumerate(messages) if text]
        raise ValueError("; ".join(messages))
    return outcome[0]


def num_distinct(rows: Rows, at_most: int) -> int:
    """How many different rows the ranks hold, counted up to `at_most`; by a 64-bit fingerprint of each row's bits."""
    mine = torch.empty(0, dtype=torch.int64)
    for block in rows.blocks():
        bits = (block + 0.0).view(torch.int32 if block.dtype == torch.float32 else torch.int64).long()
        multipliers = torch.randint(2**62, (bits.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
        prints = torch.cat([(part * multipliers.to(part.device)).sum(1).cpu() for part in bits.split(ROWS_AT_ONCE)])
        mine = torch.cat([mine, prints]).unique()[:at_most]
    everyone = np.concatenate(collectives.gather_objects(mine.numpy()))
    return min(at_most, len(np.unique(everyone)))


def _slices(array: np.ndarray) -> Iterator[np.ndarray]:
    """A few megabytes at a time; what torch may not share is read into one buffer, again and again.

    A file's pages that were read are dropped: they would count as memory in use.
    """
    step = max(1, BLOCK_BYTES // max(1, array[:1].nbytes))
    pages = _pages(array)
    shared = array.flags.writeable and array.flags.c_contiguous and array.dtype.isnative and pages is None
    buffer = None if shared else np.empty((min(step, len(array)), *array.shape[1:]), array.dtype.newbyteorder("="))
    for first in range(0, len(array), step):
        part = array[first : first + step]
        if buffer is not None:
            buffer[: len(part)] = part
            part = buffer[: len(part)]
        yield part
        if pages is not None:
            pages.madvise(mmap.MADV_DONTNEED)


def _pages(array: Any) -> mmap.mmap | None:
    """The file mapping below a memmap. Not of mode "c": its changes are in those pages alone."""
    if not isinstance(array, np.memmap) or array.mode == "c" or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) else None


def _writable(array: np.ndarray) -> np.ndarray:
    """Of a type and layout that torch takes without a warning: a read-only block is copied."""
    array = np.asarray(array)
    native = array.dtype if array.dtype.isnative else array.dtype.newbyteorder("=")
    return np.require(array, native, ["C", "W"])
