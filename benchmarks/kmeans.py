"""k-means against faiss-cpu and scikit-learn on the same rows from the same start; over ranks; and from disk.

Command: python benchmarks/kmeans.py    (--part assign|assign-large|ways|fit|ranks|disk|all, --repeats R, --data D)

Rows are N unit vectors [N, D] about 2k random directions, D = blobs (noise 0.7 of the directions' deviation),
overlapping (1.5) or shapeless (no directions). The start is k of the rows. One thread each, at the precision the
trainer sets, contestants in turn in one process, CPU seconds; ratios are of runs of the same repeat.

assign:       labels of 100,000 x 128 rows, k = 1,000; and the matrix product alone, at two block sizes, the better one.
assign-large: of 200,000 x 256 rows, k = 10,000.
ways:         ways to reduce the scores, by rows scored at once (argmaxes.py).
fit:          20 iterations, 100,000 x 128, k = 1,000, with the labels of the final centroids: faiss, which returns
              none, with and without a search for them. The objective is computed in float64 for each one's centroids.
ranks:        W = 1, 2, 4 processes, rows spread at random, one of four without any.
disk:         5,000,000 x 64 float32 in a memory-mapped file, k = 1,000, 3 iterations: the peak of resident memory
              (VmHWM) of a fresh process, torch included (kmeans_disk.py).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import argmaxes
import kmeans_disk
import provenance
import stopwatch
import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import collectives
from distssl.nn import kmeans, precision

NOISE = {"blobs": 0.7, "overlapping": 1.5, "shapeless": None}
ITERATIONS = 20
OURS = "distssl"
PARTS = ("assign", "assign-large", "ways", "fit", "ranks", "disk")
BARS = {"assign": 1.5, "assign-large": 1.5, "fit": 2.0}  # times faiss
RANKS = {"rows": 20000, "dim": 64, "k": 200}


def problem(num_rows: int, dim: int, k: int, data: str = "blobs") -> tuple[Tensor, Tensor]:
    """Rows [N, D] and a start [k, D]."""
    generator = torch.Generator().manual_seed(0)
    noise = NOISE[data]
    x = torch.randn(num_rows, dim, generator=generator)
    if noise is not None:
        directions = torch.randn(2 * k, dim, generator=generator)
        x.mul_(noise).add_(directions[torch.randint(2 * k, (num_rows,), generator=generator)])
    x = F.normalize(x, dim=1)
    return x, x[torch.randperm(num_rows, generator=generator)[:k]].clone()


def in_turn(contestants: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """CPU seconds of each contestant, once a repeat; and what the last run returned."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    results = {}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            with stopwatch.Clock() as clock:
                results[name] = contestant()
            found[name].append(clock.cpu_s)
            print(f"  {name}: {clock.cpu_s:.2f} s", file=sys.stderr, flush=True)
    return found, results


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def speed_rows(found: dict[str, list[float]], than: str) -> list[str]:
    """A line a contestant: CPU seconds, and how many times as fast as `than`."""
    return [
        f"| {name} | {spread(times)} | {spread([a / b for a, b in zip(found[than], times, strict=True)])}"
        for name, times in found.items()
    ]


def assign_table(part: str, repeats: int, data: str) -> list[str]:
    num_rows, dim, k = (100_000, 128, 1000) if part == "assign" else (200_000, 256, 10_000)
    x, c = problem(num_rows, dim, k, data)
    blocks = (512, k) if part == "assign" else (1024, 1000)
    contestants = {
        OURS: lambda: kmeans.assign(x, c),
        "faiss": lambda: torch.from_numpy(faiss_index(c).search(x.numpy(), 1)[1][:, 0]),
        "the product alone": lambda: product(x, c, *blocks),
    }
    if part == "assign":
        from sklearn.metrics import pairwise_distances_argmin

        contestants["scikit-learn"] = lambda: torch.from_numpy(pairwise_distances_argmin(x.numpy(), c.numpy()))
    found, labels = in_turn(contestants, repeats)
    lines = [f"| {num_rows:,} x {dim}, k = {k:,}, {data} | CPU seconds | times as fast as faiss | labels unlike ours |"]
    lines.append("|---|---|---|---|")
    for name, line in zip(found, speed_rows(found, "faiss"), strict=True):
        lines.append(f"{line} | {differences(x, c, labels[OURS], labels[name])} |")
    share = spread([a / b for a, b in zip(found["the product alone"], found[OURS], strict=True)])
    return [*lines, "", f"Of the rate of the product alone: {share}.", verdict(part, found)]


def product(x: Tensor, c: Tensor, rows: int, columns: int) -> None:
    """Nothing but the scores' matrix product, in blocks."""
    buffer = x.new_empty(rows * columns)
    for part in x.split(rows):
        for block in c.split(columns):
            torch.mm(part, block.T, out=buffer[: len(part) * len(block)].view(len(part), -1))


def differences(x: Tensor, c: Tensor, ours: Tensor, theirs: Tensor | None) -> str:
    """How many labels differ, and in how many of those our centroid is the nearer one, or as near, in float64."""
    if theirs is None:
        return ""
    rows = (ours != theirs).nonzero()[:, 0]
    if not len(rows):
        return "0"
    near, far = ((x[rows].double() - c[labels[rows]].double()).square().sum(1) for labels in (ours, theirs.long()))
    return f"{len(rows)}, ours nearer in {int((near <= far).sum())}"


def verdict(part: str, found: dict[str, list[float]], than: str = "faiss") -> str:
    ratio = statistics.median(a / b for a, b in zip(found[than], found[OURS], strict=True))
    return f"Bar: {BARS[part]} times {than}; {ratio:.2f}, {'reached' if ratio >= BARS[part] else 'MISSED'}."


def faiss_index(c: Tensor) -> Any:
    import faiss

    index = faiss.IndexFlatL2(c.shape[1])
    index.add(c.numpy())  # pyright: ignore[reportCallIssue]
    return index


def ways_table(repeats: int, data: str) -> list[str]:
    x, c = problem(50_000, 128, 1000, data)
    lines = [f"| 50,000 x 128, k = 1,000: CPU seconds | {' | '.join(argmaxes.WAYS)} |"]
    lines.append("|---" * (len(argmaxes.WAYS) + 1) + "|")
    for rows in (128, 256, 512, 1024, 4096):
        contestants = {name: lambda way=way, rows=rows: way(x, c, rows) for name, way in argmaxes.WAYS.items()}
        found, _ = in_turn(contestants, repeats)
        lines.append(f"| {rows} rows at once | {' | '.join(spread(times) for times in found.values())} |")
    return lines


def fit_table(repeats: int, data: str) -> list[str]:
    num_rows, dim, k = 100_000, 128, 1000
    x, c = problem(num_rows, dim, k, data)
    contestants = {
        OURS: lambda: kmeans.fit(x, k, ITERATIONS, init=c).centroids,
        f"{OURS}, plain": lambda: kmeans.fit(x, k, ITERATIONS, init=c, skip=False).centroids,
        "faiss": lambda: faiss_fit(x, c, labels=True),
        "faiss, no labels": lambda: faiss_fit(x, c, labels=False),
        "scikit-learn": lambda: sklearn_fit(x, c),
    }
    found, centroids = in_turn(contestants, repeats)
    objectives = {name: objective(x, of) for name, of in centroids.items()}
    lines = [
        f"| {num_rows:,} x {dim}, k = {k:,}, {data} | CPU seconds | times as fast as faiss | objective over faiss's |"
    ]
    lines.append("|---|---|---|---|")
    for name, line in zip(found, speed_rows(found, "faiss"), strict=True):
        lines.append(f"{line} | {objectives[name] / objectives['faiss'] - 1:+.1e} |")
    done = kmeans.fit(x, k, ITERATIONS, init=c)
    same = torch.equal(done.centroids, centroids[f"{OURS}, plain"])
    lines += ["", f"{OURS} stopped after {done.num_iterations} iterations, converged: {done.converged}."]
    lines.append(f"Centroids with and without bounds: {'the same bits' if same else 'DIFFERENT'}.")
    return [*lines, verdict("fit", found), verdict("fit", found, "faiss, no labels")]


def faiss_fit(x: Tensor, c: Tensor, labels: bool) -> Tensor:
    import faiss

    k, dim = c.shape
    clusters = faiss.Kmeans(dim, k, niter=ITERATIONS, max_points_per_centroid=len(x))  # no subsampling
    clusters.train(x.numpy(), init_centroids=c.numpy())
    if labels:
        clusters.index.search(x.numpy(), 1)
    return torch.from_numpy(clusters.centroids)


def sklearn_fit(x: Tensor, c: Tensor) -> Tensor:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        # Types that pyright takes from the defaults.
        clusters = KMeans(len(c), init=c.numpy(), n_init=1, max_iter=ITERATIONS, tol=0)  # pyright: ignore[reportArgumentType]
        clusters.fit(x.numpy())
    return torch.from_numpy(clusters.cluster_centers_)


def objective(x: Tensor, centroids: Tensor) -> float:
    labels = kmeans.assign(x, centroids)
    parts = zip(x.split(8192), labels.split(8192), strict=True)
    return sum(float((rows.double() - centroids[of].double()).square().sum()) for rows, of in parts)


def ranks_table() -> list[str]:
    lines = [f"| {RANKS} | largest difference of a centroid | labels unlike | objective over W = 1's | iterations |"]
    lines.append("|---|---|---|---|---|")
    alone = None
    for world_size in (1, 2, 4):
        found = collectives.launch(of_rank, world_size)
        labels = torch.empty(RANKS["rows"], dtype=torch.int64)
        for mine, of, *_ in found:
            labels[mine] = of
        _, _, centroids, value, iterations = found[0]
        alone = alone or (labels, centroids, value)
        apart = max(float((of_one[2] - alone[1]).abs().max()) for of_one in found)
        unlike = int((labels != alone[0]).sum())
        lines.append(f"| W = {world_size} | {apart:.1e} | {unlike} | {value / alone[2] - 1:+.1e} | {iterations} |")
    return lines


def of_rank() -> tuple[Tensor, Tensor, Tensor, float, int]:
    """This rank's ids and labels; centroids, objective and iterations. Of four ranks the second has no rows."""
    x, _ = problem(RANKS["rows"], RANKS["dim"], RANKS["k"])
    rank, world_size = collectives.rank(), collectives.world_size()
    ids = torch.randperm(len(x), generator=torch.Generator().manual_seed(world_size))
    owner = torch.arange(len(x)) % world_size
    if world_size == 4:
        owner[owner == 1] = 3
    mine = ids[owner == rank]
    found = kmeans.fit(x[mine], RANKS["k"], ITERATIONS, ids=mine)
    return mine, found.labels, found.centroids, found.objective, found.num_iterations


def tables(part: str, repeats: int, data: str) -> list[str]:
    if part in ("assign", "assign-large"):
        return assign_table(part, repeats, data)
    if part == "ways":
        return ways_table(repeats, data)
    if part == "fit":
        return fit_table(repeats, data)
    return ranks_table() if part == "ranks" else kmeans_disk.table()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", choices=NOISE, default="blobs")
    args = parser.parse_args()
    import faiss

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    lines = [provenance.describe(), f"- float32 products: {precision.speed_up_float32_matmul()}; one thread", ""]
    for part in PARTS if args.part == "all" else (args.part,):
        lines += [*tables(part, args.repeats, args.data), ""]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
