from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distssl.nn import kmeans
from tests import blobs

ROWS, DIM, CLUSTERS = 700, 12, 20


def problem() -> Tensor:
    return blobs.overlapping(ROWS, DIM, sources=30)


def blocks(x: np.ndarray, size: int) -> Any:
    return lambda: (x[first : first + size] for first in range(0, len(x), size))


def test_a_file_and_an_iterator_give_what_the_tensor_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans.rows, "BLOCK_BYTES", 100 * DIM * 4)
    x = problem()
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (ROWS + 50, DIM))
    file[:50], file[50:] = 1.0, x.numpy()
    file.flush()
    expected = kmeans.fit(x, CLUSTERS, 8, seed=2)
    on_disk = np.load(tmp_path / "x.npy", mmap_mode="r")[50:]
    for source in (
        on_disk,
        x.numpy(),
        file[50:],
        blocks(x.numpy(), 33),
        blocks(on_disk, 700),
        x.double().float().T.contiguous().T,
    ):
        found = kmeans.fit(source, CLUSTERS, 8, seed=2)
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.centroids, expected.centroids)
    assert np.array_equal(file[50:], x.numpy())


def test_changes_of_a_copy_on_write_file_are_kept(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", problem().numpy())
    changed = np.load(tmp_path / "x.npy", mmap_mode="c")
    changed += 5
    kmeans.fit(changed, CLUSTERS, 2)
    assert np.array_equal(changed, problem().numpy() + 5)


def test_bfloat16_rows_are_clustered_in_float32() -> None:
    x = problem().bfloat16()
    found, expected = kmeans.fit(x, CLUSTERS), kmeans.fit(x.float(), CLUSTERS)
    assert found.centroids.dtype == torch.float32
    assert torch.equal(found.centroids, expected.centroids)


def constant() -> Tensor:
    return torch.full((50, 3), 0.1)


ERRORS = [
    (lambda: problem(), {"k": ROWS + 1}, rf"k={ROWS + 1} clusters of {ROWS} rows on all ranks; 1 to {ROWS} is right"),
    (lambda: problem(), {"k": 0}, "k=0"),
    (lambda: problem()[:0], {"k": 1}, "k=1 clusters of 0 rows"),
    (lambda: problem(), {"iterations": 0}, "iterations=0; 1 or more is right"),
    (lambda: problem().index_fill(0, torch.tensor([41]), torch.nan), {}, r"x\[41\] is NaN or infinite"),
    (lambda: problem().index_fill(0, torch.tensor([7]), -torch.inf), {}, r"x\[7\] is NaN or infinite"),
    (lambda: problem().index_fill(0, torch.tensor([7]), 1e30), {}, r"x\[7\] is NaN or infinite, or its square is"),
    (constant, {"k": 2}, "k=2 clusters, but constant features: all rows are equal; k at most 1 is right"),
    (constant, {"k": 2, "init": "random"}, "constant features"),
    (constant, {"k": 2, "init": torch.rand(2, 3)}, "constant features"),
    (lambda: problem()[:4].repeat(9, 1), {"k": 5}, "k=5 clusters, but x has 4 distinct rows; k at most 4 is right"),
    (lambda: problem(), {"init": torch.zeros(3, DIM)}, rf"init of shape \[3, {DIM}\].*\[{CLUSTERS}, {DIM}\] are right"),
    (lambda: problem(), {"init": torch.full((CLUSTERS, DIM), torch.nan)}, f"{CLUSTERS * DIM} of it not finite"),
    (lambda: problem(), {"init": "kmeans++"}, "init='kmeans\\+\\+'; 'k-means\\+\\+', 'random' or a tensor is right"),
    (lambda: problem(), {"ids": torch.arange(3)}, rf"ids: int64 \[3\]; integers \[{ROWS}\]"),
    (lambda: problem(), {"ids": torch.rand(ROWS)}, r"ids: float32"),
    (lambda: problem()[:, 0], {}, r"shape \[700\]; \[n, D\] is right"),
    (lambda: lambda: iter([torch.zeros(2, 3), torch.zeros(2, 4)]), {}, "x has a block of"),
]


@pytest.mark.parametrize(("source", "options", "message"), ERRORS)
def test_mistakes_are_named(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans.fit(source(), **{"k": CLUSTERS, **options})
