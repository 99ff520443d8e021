"""Images per CPU-second of two SimCLR views, side by side with torchvision v2 and lightly, with a parity report.

    python benchmarks/loader.py [--repeats 5] [--threads 2] [--size-px 224]

All pipelines read the same tars and give float32, normalised batches of two views to one consumer. distssl: its Loader
and SimCLR's own graph, `threads` DALI threads; its blur has a window of 13, which torchvision is given too.
torchvision v2: the fastest of three recipes (`recipe`), measured first. lightly: its own SimCLRTransform on PIL images;
its blur is PIL's, whose cost does not depend on sigma. Peers run in a DataLoader with `threads` workers of one torch
thread each and decode an image once for both views.

CPU-seconds are user + system of a fresh process and its joined workers, from before the pipeline is built to after its
workers are joined; imports and one batch of warm-up come before. So building graphs and forking workers is in the
figure and nothing is estimated or subtracted. Repeats are interleaved and ratios paired within a repeat.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import provenance
from loader_pipelines import LIGHTLY, OURS, RAMP_HW, RECIPES, Work, run_child, work_size

from distssl import errors

ARCHIVE = "clothing_cc0_originals_400.zip"
TARGETS = {"torchvision v2": 1.6, "lightly": 1.5}


def measure(pipelines: list[str], work: Work, repeats: int) -> dict[str, list[dict]]:
    """Every pipeline once a repeat, in turn, each in a fresh process."""
    found: dict[str, list[dict]] = {name: [] for name in pipelines}
    for repeat in range(repeats):
        for name in pipelines:
            result = in_child(dataclasses.replace(work, pipeline=name))
            found[name].append(result)
            rate = result["images"] / result["cpu_s"]
            print(f"  repeat {repeat + 1}/{repeats}  {name:28s} {rate:6.1f} images per CPU-second", file=sys.stderr)
    return found


def in_child(work: Work) -> dict:
    command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(dataclasses.asdict(work))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{work.pipeline} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float], digits: int) -> str:
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def speed_table(found: dict[str, list[dict]]) -> list[str]:
    """Markdown: medians [min, max]; the ratios are of runs of the same repeat."""
    rates = {name: [run["images"] / run["cpu_s"] for run in runs] for name, runs in found.items()}
    walls = {name: [run["images"] / run["wall_s"] for run in runs] for name, runs in found.items()}
    lines = [
        "| pipeline | images per CPU-second | images per second, wall | distssl is |",
        "|---|---|---|---|",
    ]
    for name in found:
        ratio = "1" if name == OURS else times(rates[OURS], rates[name])
        lines.append(f"| {name} | {spread(rates[name], 1)} | {spread(walls[name], 1)} | {ratio} |")
    for name in found:
        target = next((TARGETS[start] for start in TARGETS if name.startswith(start)), None)
        if target:
            ratio = statistics.median(a / b for a, b in zip(rates[OURS], rates[name], strict=True))
            verdict = "reached" if ratio >= target else "MISSED"
            lines.append(f"\nTarget against {name}: {target}x; {ratio:.2f}x, {verdict}.")
    return lines


def times(ours_: list[float], theirs: list[float]) -> str:
    return spread([a / b for a, b in zip(ours_, theirs, strict=True)], 2) + " x"


# name -> (allowed systematic difference from torchvision v2, of what it is a share, why so much or what it is)
PARITY = {
    **{f"mean {c}": (0.10, "", "absolute, of normalised values") for c in "RGB"},
    **{f"std {c}": (0.08, "relative", "contrast about 128, one clamp for all colour steps, hue in YIQ") for c in "RGB"},
    "grey": (0.0, "", "a coin"),
    "gradient energy": (0.15, "relative", "follows the square of the contrast"),
    "crop area": (0.02, "", "read off the pixels"),
    "aspect": (0.05, "relative", "geometric mean, width over height, in pixels"),
    "flipped": (0.0, "", "a coin"),
}


def parity_table(work: Work, pipelines: list[str]) -> list[str]:
    """Markdown: each statistic, and whether it is torchvision v2's within its tolerance and three standard errors."""
    described = {name: describe(dataclasses.replace(work, pipeline=name, task="statistics")) for name in pipelines}
    reference = next(described[name] for name in pipelines if name in RECIPES)
    lines = [f"| statistic | {' | '.join(pipelines)} | tolerance | why |", "|---" * (len(pipelines) + 3) + "|"]
    for statistic, (tolerance, kind, why) in PARITY.items():
        expected, error = reference[statistic]
        allowed = tolerance * abs(expected) if kind else tolerance
        cells = []
        for name in pipelines:
            value, own_error = described[name][statistic]
            fits = abs(value - expected) <= allowed + 3 * math.hypot(error, own_error)
            cells.append(f"{value:.4g} ± {own_error:.1g}{'' if fits else ' OUTSIDE'}")
        lines.append(f"| {statistic} | {' | '.join(cells)} | {allowed:.3g} + 3 s.e. | {why} |")
    return lines


def describe(work: Work) -> dict[str, tuple[float, float]]:
    """statistic -> (value, standard error), over all views."""
    values = {name: np.array(found) for name, found in in_child(work).items()}
    values |= in_child(dataclasses.replace(work, folder=f"{work.folder}-ramps", task="geometry")).items()
    mean = {name: (float(np.mean(v)), float(np.std(v) / math.sqrt(len(v)))) for name, v in values.items()}
    for c in "RGB":
        std = math.sqrt(mean[f"square {c}"][0] - mean[f"mean {c}"][0] ** 2)
        mean[f"std {c}"] = (std, mean[f"square {c}"][1] / (2 * std))
    aspect, error = mean["log aspect"]
    mean["aspect"] = (math.exp(aspect), error * math.exp(aspect))
    return mean


def pack(cache: Path, archive: Path) -> Path:
    """The photos as shards, and beside them as many ramps (red is x, green is y) to read crops off."""
    from PIL import Image

    from distssl.data import shards

    folder = shards.pack(str(archive), cache / "clothing")
    ramps, packed = cache / "ramps", cache / "clothing-ramps"
    if not (packed / "dataset.json").exists():
        ramps.mkdir(parents=True, exist_ok=True)
        height, width = RAMP_HW
        y, x = np.mgrid[0:height, 0:width]
        pixels = np.stack([255 * (x + 0.5) / width, 255 * (y + 0.5) / height, 0 * x], axis=-1)
        image = Image.fromarray(pixels.round().astype(np.uint8))
        for i in range(work_size(str(folder))):
            image.save(ramps / f"{i:04d}.png")
        shards.pack(str(ramps), packed)
    return folder


def fastest_recipe(work: Work) -> tuple[str, list[str]]:
    """Which torchvision v2 recipe takes the least CPU, and a line for each."""
    found = measure(list(RECIPES), dataclasses.replace(work, passes=1), 2)
    rate = {name: statistics.median(run["images"] / run["cpu_s"] for run in runs) for name, runs in found.items()}
    lines = [f"- {name}: {rate[name]:.1f} images per CPU-second" for name in RECIPES]
    return max(rate, key=rate.__getitem__), lines


def find_archive() -> Path:
    project = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("DISTSSL_DATA", project.parent / "shared" / "data"))
    if not (folder / ARCHIVE).exists():
        print(f"DISTSSL_DATA={folder}: no {ARCHIVE} there; give the folder that holds it", file=sys.stderr)
        sys.exit(2)
    return folder / ARCHIVE


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per CPU-second of two SimCLR views, against peers.")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each pipeline, interleaved (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="DALI threads and DataLoader workers (default 2)")
    parser.add_argument("--size-px", type=int, default=224, help="side of a view (default 224)")
    parser.add_argument("--passes", type=int, default=3, help="over the 400 photos in a run (default 3)")
    parser.add_argument("--batch-size", type=int, default=64, help="images a batch (default 64)")
    parser.add_argument("--cache", type=Path, help="folder for the packed shards, kept (default: a temporary one)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_child(Work(**json.loads(args.child)))))
        return
    if min(args.repeats, args.threads, args.passes, args.batch_size) < 1 or args.size_px < 8:
        parser.error("repeats, threads, passes and batch-size are at least 1, size-px at least 8")
    if importlib.util.find_spec("lightly") is None:
        parser.error("lightly is not installed; pip install '.[dev]'")
    archive = find_archive()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            folder = pack(args.cache or Path(temporary), archive)
        except errors.ConfigError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        report(args, folder)


def report(args: argparse.Namespace, folder: Path) -> None:
    images = work_size(str(folder))
    work = Work("", str(folder), args.passes, args.threads, args.size_px, args.batch_size)
    torchvision, recipes = fastest_recipe(work)
    pipelines = [OURS, torchvision, LIGHTLY]
    found = measure(pipelines, work, args.repeats)
    print(provenance.describe())
    print(f"- n: {args.repeats} interleaved repeats of {args.passes * images} images; median [min, max]\n")
    print("torchvision v2's recipes, measured first:\n")
    print("\n".join(recipes), "\n", sep="\n")
    print("\n".join(speed_table(found)), "\n", sep="\n")
    print(f"Parity with torchvision v2, over {2 * args.passes * images} views; value ± standard error.\n")
    print("\n".join(parity_table(work, pipelines)))


if __name__ == "__main__":
    main()
