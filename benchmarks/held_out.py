"""How well does the network of `corruption` tell corruptions that it never saw from clean photos?

Command: python benchmarks/held_out.py           (--help for the rest)

The area under the ROC of p(clean), 0.5 being chance, for every held-out type, over grocery's test photos, which nobody
was trained on. The networks are learn.py's, a seed each; beside each the same network before training.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import contestants
import numpy as np
import photos
import provenance
import torch
from contestants import Settings

from distssl import method, run_folder
from distssl.context import Context
from distssl.data.quarantine import Quarantine
from distssl.data.shards import Dataset
from distssl.downstream import features
from distssl.methods import corruption
from distssl.methods.corruption import Corruption


def areas(net: method.Method, packed: Path, context: Context, threads: int) -> dict[str, float]:
    """By held-out type."""
    assert isinstance(net, Corruption)
    dataset, size_px = Dataset.open(packed), net.cfg.augment.size_px
    how = features.Extraction(size_px, crop=1.0, threads=threads, max_pixels=50_000_000, dtype=torch.float32)
    shown = functools.partial(corruption.exam, net.cfg)
    seen = features.batches(dataset, dataset.ids_with("label"), shown, how, context, Quarantine())
    return corruption.held_out_auc(net, seen)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/photos"), help="learn.py's runs; those that are not there are trained"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=Settings.threads)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings, out = Settings(threads=args.threads), args.out.resolve()
    prepared = photos.prepare(out, settings.images)
    found: dict[str, list[dict[str, float]]] = {"untrained": [], "trained": []}
    for seed in range(args.seeds):
        run = contestants.run_of("corruption", settings, prepared, out, seed)
        contestants.trained(run)
        nets = {"untrained": method.build(run), "trained": run_folder.trained(run, run.run_dir)}
        for name, net in nets.items():
            found[name].append(areas(net, prepared.splits["grocery"].test, Context(out), args.threads))
    print(render(found))


def render(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a line a network, a column a type; means over seeds, and their largest distance from it."""
    types = list(found["trained"][0])
    lines = [provenance.describe(), "", f"| network | n | {' | '.join(types)} |", "|---|---|" + "---|" * len(types)]
    for name, by_seed in found.items():
        columns = [np.array([one[kind] for one in by_seed]) for kind in types]
        texts = [f"{x.mean():.3f} ± {abs(x - x.mean()).max():.3f}" for x in columns]
        lines.append(f"| {name} | {len(by_seed)} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
