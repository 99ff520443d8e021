"""Does `plan` tell the truth? Its images/s at two workers, and its all-reduce at eight, against what is then measured.

Command: python benchmarks/plan.py            (--part scaling|blocks|allreduce, --repeats N; allreduce needs root)

scaling: the demo's config. A calibration of single workers (two side by side that exchange nothing; and one alone, for
comparison) predicts two; then two gloo ranks train. In turn: a training is compared with the mean of the calibrations
before and after it, for what else the machine does comes and goes.
blocks: the same for a machine that is not at rest. Two processes take BLOCK steps as two ranks, and BLOCK steps as
such whose collectives return at once, in turn; what is compared are neighbours of a few seconds.
allreduce: eight hosts behind slow links (shaped_links.py). alpha and beta are fitted at two and four ranks, all-reduces
of eight are predicted, and timed. Beside it the textbook's ring, 2 (W - 1) (alpha + n beta / W), fitted to the same.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import all_reduces
import numpy as np
import provenance
import shaped_links
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed import fake_pg  # noqa: F401 - makes the backend known

from distssl import calibrate, collectives, config, estimate, job, method, train
from distssl.calibrate import Calibration, Data
from distssl.config import Run
from distssl.context import Context
from distssl.data import order
from distssl.data.shards import Dataset
from distssl.estimate import Links, Measured, Timing

LOG_EVERY = 10
WINDOWS = 2  # of LOG_EVERY steps, after one to warm up
BLOCK, NUM_BLOCKS = 5, 4  # steps; pairs of blocks a repeat
SIDE_BY_SIDE, ALONE = "two side by side", "one alone"
FITTED, PREDICTED = (2, 4), 8
REDUCED = ((1 << 10, 15), (250_000, 9), (1_000_000, 5), (4_000_000, 3), (16_000_000, 3), (100_000_000, 3))


class Stamps(Context):
    """Notes when the run logs, on rank 0, and stops it after WINDOWS windows and the first."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        self.at: list[float] = []

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        self.at.append(time.perf_counter())

    def stop_requested(self) -> bool:
        return len(self.at) > WINDOWS


@dataclass(frozen=True)
class Pair:
    """Images/s of two workers: as predicted from each kind of calibration, and as they were."""

    predicted: dict[str, float]
    measured: float

    def error(self, kind: str) -> float:
        return self.predicted[kind] / self.measured - 1


def measure_scaling(repeats: int, overrides: Sequence[str]) -> list[Pair]:
    run, data = _demo(overrides)
    pairs, before = [], _predict(run, data)
    for repeat in range(repeats):
        measured = _train(run, data)
        after = _predict(run, data)
        predicted = {kind: (before[kind] + after[kind]) / 2 for kind in after}
        pairs.append(Pair(predicted, measured))
        errors = ", ".join(f"{pairs[-1].error(kind):+.1%} ({kind})" for kind in predicted)
        print(f"scaling {repeat + 1}/{repeats}: {measured:.0f} images/s, predicted {errors}", flush=True)
        before = after
    return pairs


def _demo(overrides: Sequence[str]) -> tuple[Run, Data]:
    free = ["eval.tasks=[]", "eval.every=null", f"train.log_every={LOG_EVERY}", "checkpoint.every=1000000"]
    run = config.load(provenance.ROOT / "configs/default.yaml", [*free, *overrides], method.options)
    folders = job.folders(run, ())
    return run, Data(folders.data, folders.labelled)


def _predict(run: Run, data: Data) -> dict[str, float]:
    """Images/s of two workers from one calibration."""
    half = run.data.global_batch // 2
    made = calibrate.measure(run, data, [(half, 1), (half, 2)])
    return {
        kind: _two_workers(made, next(timing for timing in made.timings if timing.beside == beside))
        for kind, beside in ((SIDE_BY_SIDE, 2), (ALONE, 1))
    }


def _two_workers(made: Calibration, timing: Timing) -> float:
    talk = {"gradient_bytes": made.gradient_bytes, "blocking": made.blocking}
    return estimate.step(timing, 2, made.links, **talk, overlap=False).images_per_s


def _train(run: Run, data: Data) -> float:
    """Images/s of two ranks that train."""
    with tempfile.TemporaryDirectory(prefix="distssl-plan-") as folder:
        step_s = collectives.launch(_step_s, 2, run, data, folder)[0]
    return run.data.global_batch / step_s


def _step_s(run: Run, data: Data, folder: str) -> float:
    with Stamps(Path(folder)) as stamps:
        train.Training(run, stamps, Dataset.open(data.images, run.machine)).run()
    return (stamps.at[WINDOWS] - stamps.at[0]) / (WINDOWS * LOG_EVERY) if stamps.rank == 0 else 0.0


def measure_blocks(repeats: int, overrides: Sequence[str]) -> list[Pair]:
    run, data = _demo(overrides)
    pairs = []
    for repeat in range(repeats):
        pairs += collectives.launch(_blocks, 2, run, data, NUM_BLOCKS)[0]
        errors = " ".join(f"{pair.error(SIDE_BY_SIDE):+.1%}" for pair in pairs[-NUM_BLOCKS:])
        print(f"blocks {repeat + 1}/{repeats}: {errors}", flush=True)
    return pairs


def _blocks(run: Run, data: Data, num: int) -> list[Pair]:
    """One rank of two, whose collectives now and then return at once."""
    half, lanes = run.data.global_batch // 2, order.lanes_of(run)
    blocking, links = calibrate._talk(run, data)
    silent = dist.new_group([0, 1], backend="fake")
    assert isinstance(silent, dist.ProcessGroup)
    pairs = []
    with contextlib.ExitStack() as stack:
        together = stack.enter_context(calibrate._training(run, half, data, lanes))
        size = calibrate._gradient_bytes(together)
        with _in_group(silent):
            alone = stack.enter_context(calibrate._training(run, half, data, lanes))
            alone.model = alone.method
        steps = {SIDE_BY_SIDE: alone, "": together}
        batches = {kind: training.batches() for kind, training in steps.items()}
        for nth in range(num + 1):
            seconds = {}
            for kind in steps if nth % 2 else reversed(steps):
                collectives.barrier()
                with _in_group(silent) if kind else contextlib.nullcontext():
                    seconds[kind] = _steps_s(steps[kind], batches[kind])
            found = collectives.gather_objects(seconds)
            timing = Timing(half, 2, 0, 0, float(np.mean([one[SIDE_BY_SIDE] for one in found])))
            predicted = estimate.step(timing, 2, links, gradient_bytes=size, blocking=blocking, overlap=False)
            pairs.append(Pair({SIDE_BY_SIDE: predicted.images_per_s}, 2 * half / found[0][""]))
    return pairs[1:]  # the first warmed up


def _steps_s(training: train.Training, batches: Iterator[dict[str, Tensor]]) -> float:
    started = time.perf_counter()
    for _ in range(BLOCK):
        training.take_step(batches)
    return (time.perf_counter() - started) / BLOCK


@contextmanager
def _in_group(group: dist.ProcessGroup) -> Iterator[None]:
    """Let collectives be those of another group meanwhile."""
    there = dist.GroupMember.WORLD
    distributed_c10d._update_default_pg(group)
    try:
        yield
    finally:
        distributed_c10d._update_default_pg(there)


def scaling_table(pairs: Sequence[Pair]) -> list[str]:
    lines = ["| images/s at W = 2 | n | mean ± 95 % | min | max |", "|---|---|---|---|---|"]
    lines.append(_row("measured", [pair.measured for pair in pairs], "{:.0f}"))
    for kind in pairs[0].predicted:
        lines.append(_row(f"predicted from {kind}", [pair.predicted[kind] for pair in pairs], "{:.0f}"))
        lines.append(_row(f"its error, % (bar: {_bar(kind)})", [100 * pair.error(kind) for pair in pairs], "{:+.1f}"))
    return lines


def _bar(kind: str) -> str:
    return "15" if kind == SIDE_BY_SIDE else "none"


def measure_all_reduces(repeats: int, mbit_per_s: float, delay_s: float) -> list[Measured]:
    sizes = [(num_bytes, max(times, repeats)) for num_bytes, times in REDUCED]
    with shaped_links.hosts(PREDICTED, mbit_per_s, delay_s) as hosts:
        timed = all_reduces.timed(hosts, [*FITTED, PREDICTED], sizes)
    return [Measured(row["num_bytes"], row["world_size"], seconds) for row in timed for seconds in row["seconds"]]


def all_reduce_table(measured: Sequence[Measured]) -> list[str]:
    fitted = [one for one in _medians(measured) if one.world_size in FITTED]
    links, textbook = estimate.fit_links(fitted), _fit_textbook(fitted)
    lines = [
        f"alpha {links.alpha_s * 1e3:.2f} ms, beta {8e-6 / links.beta_s:.0f} Mbit/s; "
        f"textbook {textbook.alpha_s * 1e3:.2f} ms, {8e-6 / textbook.beta_s:.0f} Mbit/s",
        "",
        "| all-reduce | W | n | median s | min | max | predicted | error, % (bar: 20) | textbook's, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in _medians(measured):
        same = [each for each in measured if (each.num_bytes, each.world_size) == (one.num_bytes, one.world_size)]
        seconds = [each.seconds for each in same]
        predicted = estimate.all_reduce_s(one.num_bytes, one.world_size, links)
        role = "" if one.world_size in FITTED else "**"
        errors = [predicted / one.seconds - 1, _textbook_s(one, textbook) / one.seconds - 1]
        lines.append(
            f"| {one.num_bytes / 1e6:g} MB | {role}{one.world_size}{role} | {len(seconds)} | {one.seconds:.4f} "
            f"| {min(seconds):.4f} | {max(seconds):.4f} | {predicted:.4f} | {errors[0]:+.1%} | {errors[1]:+.1%} |"
        )
    return lines


def _medians(measured: Sequence[Measured]) -> list[Measured]:
    groups: dict[tuple[int, int], list[float]] = {}
    for one in measured:
        groups.setdefault((one.num_bytes, one.world_size), []).append(one.seconds)
    return [Measured(*key, statistics.median(seconds)) for key, seconds in groups.items()]


def _fit_textbook(measured: Sequence[Measured]) -> Links:
    """Least squares of relative errors; linear in alpha and beta."""
    rows = np.array([[2 * (m.world_size - 1), 2 * (m.world_size - 1) * m.num_bytes / m.world_size] for m in measured])
    seconds = np.array([m.seconds for m in measured])
    alpha_s, beta_s = np.linalg.lstsq(rows / seconds[:, None], np.ones(len(measured)), rcond=None)[0]
    return Links(float(alpha_s), float(beta_s))


def _textbook_s(one: Measured, links: Links) -> float:
    return 2 * (one.world_size - 1) * (links.alpha_s + one.num_bytes / one.world_size * links.beta_s)


def _row(name: str, values: Sequence[float], form: str) -> str:
    mean, half = float(np.mean(values)), provenance.interval(values)
    low, high = (form.format(value) for value in (min(values), max(values)))
    return f"| {name} | {len(values)} | {form.format(mean)} ± {form.format(half).lstrip('+')} | {low} | {high} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["scaling", "blocks", "allreduce"], help="one part alone")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of scaling; the fewest all-reduces of a size")
    parser.add_argument("--mbit", type=float, default=100, help="rate of a host's link")
    parser.add_argument("--delay-ms", type=float, default=2, help="of a message on its way")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the demo's config")
    args = parser.parse_args()
    print(provenance.describe())
    if args.part in (None, "scaling"):
        print("\n".join(["", *scaling_table(measure_scaling(args.repeats, args.overrides))]), flush=True)
    if args.part == "blocks":
        print("\n".join(["", *scaling_table(measure_blocks(args.repeats, args.overrides))]), flush=True)
    if args.part in (None, "allreduce"):
        measured = measure_all_reduces(args.repeats, args.mbit, args.delay_ms / 1e3)
        print("\n".join(["", *all_reduce_table(measured)]), flush=True)


if __name__ == "__main__":
    main()
