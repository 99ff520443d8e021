"""A run's metrics as gauges of Ray, which every node exports for Prometheus: `ray_distssl_NAME{run, method}`.

Ray adds labels of its own (SessionName, NodeAddress, ...). It exports a gauge once after each `set` and drops it two
report intervals (20 s) later. So gauges are set again while the run goes on, or a kNN accuracy of every tenth epoch
would be seen for a moment only; and when it ends, or its process is killed, they are gone within those 20 s.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import NamedTuple

from ray.util.metrics import Gauge

PERIOD_S = 1.0  # no longer than Ray's shortest report interval


class Exported(NamedTuple):
    """Which metric of the log a gauge shows, and Prometheus's HELP line."""

    metric: str
    description: str


GAUGES = {
    "images_per_s": Exported("images_per_s", "Images that training took a second, over all workers"),
    "loss": Exported("loss", "Loss, mean of the steps since the last log"),
    "lr": Exported("lr", "Learning rate"),
    "data_wait": Exported("data_wait", "Share of the time that training waited for data, 0 to 1, mean over workers"),
    "gradient_norm": Exported("gradient_norm", "L2 norm of the global batch's gradient, before clipping"),
    "effective_rank": Exported("effective_rank", "Dimensions that the embeddings use"),
    "knn": Exported("knn", "Accuracy of the kNN classifier on the backbone's features, 0 to 1"),
    "quarantined": Exported("num_bad", "Samples that could not be used so far"),
    "cache_hit_rate": Exported(
        "cache_hit_rate", "Share of reads of remote shards that the node's cache served, 0 to 1"
    ),
    "epoch": Exported("epoch", "Epochs done"),
    "eta_s": Exported("eta_s", "Seconds until the end of training"),
}


class Gauges:
    """The gauges of one run, in the one process that records its metrics. `close` it when the run ends."""

    def __init__(self, run: str, method: str) -> None:
        self._gauges: dict[str, Gauge] = {}  # by the metric it shows
        for name, shown in GAUGES.items():
            gauge = Gauge(f"distssl_{name}", shown.description, tag_keys=("run", "method"))
            gauge.set_default_tags({"run": run, "method": method})
            self._gauges[shown.metric] = gauge
        self._latest: dict[str, float] = {}
        self._lock = threading.Lock()  # or an older value could be set after a newer
        self._closed = threading.Event()
        threading.Thread(target=self._keep, name="gauges", daemon=True).start()

    def record(self, metrics: Mapping[str, float]) -> None:
        """Show those of the metrics that have a gauge; one that was never recorded is not exported."""
        with self._lock:
            self._latest |= {name: metrics[name] for name in self._gauges.keys() & metrics.keys()}
            self._set()

    def close(self) -> None:
        """Keep the gauges no longer."""
        self._closed.set()

    def _keep(self) -> None:
        while not self._closed.wait(PERIOD_S):
            with self._lock:
                self._set()

    def _set(self) -> None:
        for name, value in self._latest.items():
            self._gauges[name].set(value)
