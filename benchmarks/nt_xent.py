"""NT-Xent in tiles against lightly's and a dense one: time, peak memory, error of the gradient; and over ranks.

Command: python benchmarks/nt_xent.py    (--part time|growth|memory|gradient|ring|others|tiles|all, --repeats R)

N is the number of images: two views make 2N rows of D = 128, and the dense matrix is [2N, 2N]. Forward and backward at
temperature 0.1, float32 products at the precision the trainer sets, one thread unless --threads says otherwise.

time:     N = 8192, in one process, the three in turn.
growth:   ours alone up to N = 65536, with the share of the rate of a product of two 2048 x 2048 matrices that is
          reached by the 4 (2N)^2 D multiplications and additions that are needed.
memory:   each in a fresh process after a small step: the kernel's peak of resident memory (VmHWM, reset before) less
          the resident memory before, when the inputs exist. Their gradients count.
gradient: |g - g'| / |g'|, g' of float64. The second view is the first with noise of a deviation of 1, 0.1, 0.001: with
          the last, positives stand 1 / temperature above nearly all negatives.
ring:     the gradient of W ranks against one process in float64, and the bytes that collectives.rotate was given.
others:   the other losses that use the tiles against dense ones.
tiles:    seconds by side of the tile, for choosing contrastive.TILE.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import dense_losses
import provenance
import torch
import torch.nn.functional as F
from torch import Tensor

from distssl import collectives
from distssl.methods import segsort
from distssl.nn import contrastive, losses, precision

D = 128
TEMPERATURE = 0.1  # nt_xent's default
LOSSES: dict[str, Callable[..., Tensor]] = {
    "distssl": losses.nt_xent,
    "dense": dense_losses.nt_xent,
    "lightly": dense_losses.lightly_nt_xent,
}
Pair = tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]  # ours, a dense one, what both are given
PARTS = ("time", "growth", "memory", "gradient", "ring", "others", "tiles")


def views(num_images: int, noise: float = 1.0, dim: int = D) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    za = torch.randn(num_images, dim, generator=generator)
    zb = za + noise * torch.randn(num_images, dim, generator=generator)
    return [za.requires_grad_(), zb.requires_grad_()]


def seconds(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> float:
    """Of a forward and backward pass."""
    for x in inputs:
        x.grad = None
    started = time.perf_counter()
    loss(*inputs).backward()
    return time.perf_counter() - started


def in_turn(contestants: dict[str, Callable[..., Tensor]], inputs: Sequence[Tensor], repeats: int) -> dict:
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, loss in contestants.items():
            found[name].append(seconds(loss, inputs))
            print(f"  {name}: {found[name][-1]:.3f} s", file=sys.stderr, flush=True)
    return found


def spread(values: Sequence[float], form: str = ".2f") -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(of, to, strict=True)]


def time_table(repeats: int, num_images: int = 8192) -> list[str]:
    contestants = {name: functools.partial(loss, temperature=TEMPERATURE) for name, loss in LOSSES.items()}
    in_turn(contestants, views(256), 1)
    found = in_turn(contestants, views(num_images), repeats)
    lines = [f"| N = {num_images}, n = {repeats} | seconds | of distssl's |", "|---|---|---|"]
    for name, taken in found.items():
        lines.append(f"| {name} | {spread(taken)} | {spread(ratios(taken, found['distssl']), '.1f')} |")
    return lines


def growth_table(least: int, most: int) -> list[str]:
    rate = product_rate()
    lines = [
        f"| N (a product of 2048 x 2048: {rate / 1e9:.0f} GFLOP/s) | seconds | of N^2, 1e-9 s | share of the rate |",
        "|---|---|---|---|",
    ]
    num_images = max(1024, least)
    while num_images <= most:
        repeats = 5 if num_images <= 8192 else 1
        taken = [seconds(losses.nt_xent, views(num_images)) for _ in range(repeats)]
        median = statistics.median(taken)
        share = 4 * (2 * num_images) ** 2 * D / median / rate
        lines.append(f"| {num_images} | {spread(taken)} | {median / num_images**2 * 1e9:.1f} | {share:.0%} |")
        print(lines[-1], file=sys.stderr, flush=True)
        num_images *= 2
    return lines


def product_rate() -> float:
    """FLOP/s of float32 products of large square matrices; the median of nine."""
    a, b = torch.randn(2, 2048, 2048)
    taken = []
    for _ in range(9):
        started = time.perf_counter()
        torch.mm(a, b)
        taken.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(taken)


def memory_table(least: int, most: int) -> list[str]:
    lines = [
        "| N | peak of distssl, MB | bytes a number of za and zb | of dense | of lightly |",
        "|---|---|---|---|---|",
    ]
    num_images = max(2048, least)
    while num_images <= most:
        peaks = {name: _peak_in_child(name, num_images) for name in LOSSES if name == "distssl" or num_images <= 8192}
        ours = peaks["distssl"]
        cells = [f"{peaks[name] / 1e6:.0f} MB, {peaks[name] / ours:.0f} x" if name in peaks else "" for name in LOSSES]
        lines.append(
            f"| {num_images} | {ours / 1e6:.1f} | {ours / (2 * num_images * D):.1f} | {' | '.join(cells[1:])} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
        num_images *= 2
    return lines


def _peak_in_child(name: str, num_images: int) -> int:
    command = [sys.executable, __file__, "--child", json.dumps([name, num_images])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} at N = {num_images} failed:\n{done.stderr}")
    return int(done.stdout)


def peak_bytes(name: str, num_images: int) -> int:
    loss = functools.partial(LOSSES[name], temperature=TEMPERATURE)
    seconds(loss, views(700))  # libraries are loaded, their buffers are there
    inputs = views(num_images)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    seconds(loss, inputs)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def gradient_table(num_images: int = 2048) -> list[str]:
    lines = [f"| N = {num_images}: noise | temperature | {' | '.join(LOSSES)} |", "|---" * 5 + "|"]
    for noise in (1.0, 0.1, 1e-3):
        for temperature in (0.02, 0.05, 0.1, 0.2, 0.5):
            inputs = views(num_images, noise)
            exact = _exact(inputs, temperature)
            errors = [_error(_gradient(loss, inputs, temperature), exact) for loss in LOSSES.values()]
            lines.append(f"| {noise} | {temperature} | {' | '.join(f'{error:.1e}' for error in errors)} |")
    return lines


def _exact(inputs: Sequence[Tensor], temperature: float) -> Tensor:
    return _gradient(dense_losses.exact_nt_xent, [x.detach().double().requires_grad_() for x in inputs], temperature)


def _gradient(loss: Callable[..., Tensor], inputs: Sequence[Tensor], temperature: float) -> Tensor:
    return torch.cat(torch.autograd.grad(loss(*inputs, temperature), inputs))


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def ring_table(num_images: int = 2048) -> list[str]:
    exact = _exact(views(num_images), TEMPERATURE)
    lines = [
        "| W | exchange | error of the gradient | bytes a rank, forwards | backwards | formula |",
        "|---" * 6 + "|",
    ]
    for world_size in (2, 4):
        rows = 2 * num_images // world_size  # of a rank
        formula = [(world_size - 1) * rows * numbers * 4 for numbers in (D, D + 1)]
        for exchange in ("gather", "ring"):
            found = collectives.launch(of_rank, world_size, num_images, exchange == "ring")
            halves = zip(*(gradient.chunk(2) for gradient, _ in found), strict=True)
            error = _error(torch.cat([torch.cat(half) for half in halves]), exact)
            sent = found[0][1]
            verdict = "equal on every rank" if all(count == formula for _, count in found) else f"{formula}"
            cells = [*sent, verdict] if exchange == "ring" else ["", "", ""]
            lines.append(f"| {world_size} | {exchange} | {error:.1e} | {' | '.join(map(str, cells))} |")
    return lines


def of_rank(num_images: int, ring: bool) -> tuple[Tensor, list[int]]:
    """The gradient of this rank's rows as DDP's mean makes it, and the bytes it passed on, forwards and backwards."""
    precision.speed_up_float32_matmul()
    sent: list[int] = []
    rotate = collectives.rotate
    collectives.rotate = lambda x, rows=None: sent.append(x.nbytes) or rotate(x, rows)
    inputs = [x.detach().chunk(collectives.world_size())[collectives.rank()] for x in views(num_images)]
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss = losses.nt_xent(*inputs, TEMPERATURE, ring=ring)
    forwards = sum(sent)
    gradient = torch.cat(torch.autograd.grad(loss, inputs)) / collectives.world_size()
    return gradient, [forwards, sum(sent) - forwards]


def others_table(repeats: int) -> list[str]:
    lines = [f"| n = {repeats} | distssl, s | dense, s | dense is |", "|---|---|---|---|"]
    for name, (ours, dense, inputs) in _others().items():
        in_turn({"distssl": ours, "dense": dense}, inputs, 1)
        found = in_turn({"distssl": ours, "dense": dense}, inputs, repeats)
        ratio = spread(ratios(found["dense"], found["distssl"]))
        lines.append(f"| {name} | {spread(found['distssl'], '.3f')} | {spread(found['dense'], '.3f')} | {ratio} x |")
    return lines


def _others() -> dict[str, Pair]:
    generator = torch.Generator().manual_seed(0)

    def rows(n: int, dim: int = D, grad: bool = True) -> Tensor:
        return F.normalize(torch.randn(n, dim, generator=generator), dim=1).requires_grad_(grad)

    def ours(v: Tensor, mu: Tensor) -> Tensor:
        return segsort.neighbourhood_loss(v, own, mu, kinds, 10.0)[0]

    def dense(v: Tensor, mu: Tensor) -> Tensor:
        return dense_losses.neighbourhood_loss(v, own, mu, kinds, 10.0)

    own, kinds = torch.arange(20000) % 6000, torch.arange(6000) % 20
    found: dict[str, Pair] = {}
    found["segsort, 20000 places, 6000 prototypes, D = 32"] = (ours, dense, [rows(20000, 32), rows(6000, 32)])
    for n in (32, 256):
        inputs = [rows(n), rows(n, grad=False), rows(65536, grad=False)]
        a, b = (functools.partial(f, temperature=0.2) for f in (losses.info_nce, dense_losses.info_nce))
        found[f"info_nce, {n} queries, 65536 keys"] = (a, b, inputs)
    for n, m in ((256, 4096), (4096, 4096)):
        a, b = (functools.partial(f, temperature=0.2) for f in (losses.in_batch, dense_losses.in_batch))
        found[f"in_batch, {n} queries, {m} keys"] = (a, b, [rows(n), rows(m, grad=False)])
    return found


def tiles_table(repeats: int, num_images: int = 4096) -> list[str]:
    sides = (192, 288, 384, 480, 512, 576, 672, 768, 1024)
    lines = [f"| N = {num_images}, n = {repeats} | {' | '.join(map(str, sides))} |", "|---" * (1 + len(sides)) + "|"]
    for dim in (32, 64, 128, 256):
        taken: dict[int, list[float]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side in sides:
                contrastive.TILE["cpu"] = side
                taken[side].append(seconds(losses.nt_xent, views(num_images, dim=dim)))
        lines.append(f"| D = {dim}, s | {' | '.join(spread(taken[side]) for side in sides)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--least", type=int, default=0, help="images, of growth and memory, which go on by doubling")
    parser.add_argument("--most", type=int, default=65536, help="of the same")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = precision.speed_up_float32_matmul()
    if args.child:
        print(peak_bytes(*json.loads(args.child)))
        return
    print(f"{provenance.describe()}\n- {args.threads} threads, float32 matmul precision {setting}\n")
    tables = {
        "time": lambda: time_table(args.repeats),
        "growth": lambda: growth_table(args.least, args.most),
        "memory": lambda: memory_table(args.least, args.most),
        "gradient": gradient_table,
        "ring": ring_table,
        "others": lambda: others_table(args.repeats),
        "tiles": lambda: tiles_table(args.repeats),
    }
    for part, table in tables.items():
        if args.part in (part, "all"):
            print("\n".join([f"{part}:", "", *table(), ""]), flush=True)


if __name__ == "__main__":
    main()
