"""What comes before an epoch: the dataset embedded for a method that clusters it, and what the clusters are like."""

from __future__ import annotations

import time

import numpy as np
import torch

from distssl.config import Run
from distssl.context import Context
from distssl.data import draws
from distssl.data.quarantine import Quarantine
from distssl.data.shards import Dataset
from distssl.downstream import features
from distssl.downstream.features import Extraction
from distssl.errors import RunError
from distssl.method import Method
from distssl.monitor import Monitor
from distssl.nn import cluster_health, per_sample, precision
from distssl.nn.per_sample import Embedded

NUM_SHOWN = 8  # clusters in a montage, and images of each


def run(
    cfg: Run,
    dtype: torch.dtype,
    method: Method,
    optimizer: torch.optim.Optimizer,
    step: int,
    dataset: Dataset,
    context: Context,
    bad: Quarantine,
    monitor: Monitor | None,
) -> dict[str, float]:
    """The method's `on_epoch_start` at optimiser step `step`, and what there is to log of it. Every rank calls it."""
    started = time.perf_counter()
    how = Extraction.of_run(cfg, context.device, dtype)
    features_ = _embedded(method, dataset, how, context, bad) if method.wants_features(method.epoch) else None
    before = _clusters(method)
    figures = method.on_epoch_start(method.epoch, features_)
    for parameter in method.made_anew():
        optimizer.state.pop(parameter, None)
    clusters = _clusters(method)
    if clusters is None:
        return figures
    labels = dataset.rows(np.arange(dataset.num_samples)).label  # -1 for none
    of_clusters = cluster_health.figures(clusters, before, labels, method.num_clusters)
    if monitor:
        monitor.pictures(_montage(clusters, dataset, how, context), step + 1, "clusters")
    figures |= {f"clusters/{name}": value for name, value in of_clusters.items()}
    return figures | {"clusters/seconds": time.perf_counter() - started}


def _embedded(method: Method, dataset: Dataset, how: Extraction, context: Context, bad: Quarantine) -> Embedded:
    """What the method makes of every sample that can be decoded, each rank its share; the mode is as it was after."""
    training = method.training
    method.eval()
    ids, rows = [], []
    tell = cluster_health.teller(f"epoch {method.epoch}: embedding the dataset")
    every, share = np.arange(dataset.num_samples), dataset.num_samples // context.world_size
    for batch, x in features.share(method.embed, dataset, every, how, context, bad):
        ids.append(batch["id"].to(x.device))
        rows.append(x.to(torch.promote_types(x.dtype, torch.float32)))
        tell(sum(map(len, ids)), share)
    method.train(training)
    device = context.device
    ids.append(torch.empty(0, dtype=torch.int64, device=device))
    # A rank without a share has to know how long the others' rows are.
    dims = per_sample.of_all(torch.tensor([x.shape[1] for x in rows[:1]], dtype=torch.int64, device=device))
    if not len(dims):
        raise RunError(f"none of the {dataset.num_samples} samples can be decoded; quarantine.jsonl names them")
    rows.append(torch.empty(0, int(dims[0]), dtype=precision.parameter_dtype(how.dtype), device=device))
    return Embedded(torch.cat(ids), torch.cat(rows), dataset.num_samples)


def _clusters(method: Method) -> np.ndarray | None:
    clusters = method.clusters()
    return None if clusters is None or not len(clusters) else clusters.cpu().numpy().copy()


def _montage(clusters: np.ndarray, dataset: Dataset, how: Extraction, context: Context) -> list[torch.Tensor]:
    """A row a cluster, from the largest to the smallest that has any, its members by lot: NUM_SHOWN of [K, 3, S, S].

    On one rank alone.
    """
    names, sizes = np.unique(clusters[clusters >= 0], return_counts=True)
    by_size = names[np.argsort(-sizes, kind="stable")]
    chosen = by_size[np.unique(np.linspace(0, len(by_size) - 1, NUM_SHOWN).round().astype(int))]
    shown = [_by_lot(np.flatnonzero(clusters == cluster)) for cluster in chosen]
    images = features.crops(dataset, np.unique(np.concatenate(shown)), how, context)
    blank = torch.zeros_like(next(iter(images.values())))
    return [
        torch.stack([images.get(int(ids[nth]), blank) if nth < len(ids) else blank for ids in shown])
        for nth in range(NUM_SHOWN)
    ]


def _by_lot(ids: np.ndarray) -> np.ndarray:
    return ids[np.argsort(draws.hash64(ids), kind="stable")[:NUM_SHOWN]]
