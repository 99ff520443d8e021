"""Batches of views as torch tensors: requests in, dicts of tensors out, whatever the samples' bytes do.

The pipeline runs ahead of the training step by `prefetch` batches. A batch that DALI cannot decode is lost to it, so
its samples are run again one at a time: views do not depend on the batch they are in, so nothing else changes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from distssl.data import annotations, graph, images, locations, order, probe, store
from distssl.data.dataset import Rows
from distssl.data.quarantine import Quarantine
from distssl.data.shards import Dataset
from distssl.errors import RunError


@dataclass(frozen=True)
class Request:
    """The samples one rank wants for one step.

    ids: int64 [N]. epoch: feeds the draws, of all samples or int64 [N]. replace: (index in ids, attempt) -> another id
    for a bad sample; without it bad samples are left out and the batch is smaller.
    """

    ids: np.ndarray
    epoch: int | np.ndarray = 0
    replace: Callable[[int, int], int] | None = None

    @property
    def epochs(self) -> list[int]:
        """Of each sample, N of them."""
        return np.broadcast_to(self.epoch, self.ids.shape).tolist()


class Image(NamedTuple):
    """A sample whose bytes can be given to DALI."""

    id: int
    label: int
    encoded: bytes
    target: bytes | None


class Loader:
    """Turns requests into batches of views, in their order."""

    def __init__(
        self,
        dataset: Dataset,
        views: graph.Views,
        *,
        seed: int,
        batch_size: int,
        threads: int,
        prefetch: int = 2,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
        max_pixels: int,
        quarantine: Quarantine,
        target: str | None = None,
    ) -> None:
        self.dataset = dataset
        self.views = views
        self.seed = seed
        self.batch_size = batch_size
        self.threads = threads
        self.prefetch = prefetch
        self.device = device
        self.max_pixels = max_pixels
        self.quarantine = quarantine
        self.target = target  # "mask" or "depth", where the views read one
        self.store = store.open_shards(dataset)
        self._single: graph.Graph | None = None
        self._single_feed: graph.Feed

    def batches(self, requests: Iterator[Request]) -> Iterator[dict[str, torch.Tensor]]:
        """Yield a dict of tensors for each request, "id" (int64 [N]) and "label" (int64 [N], -1 = none) among them.

        Raises RunError where a lane holds no usable sample, or where a tar cannot be read and the quarantine takes only
        what lasts. A request whose samples are all bad and may not be
        replaced yields nothing.
        """
        in_flight: deque[tuple[Request, graph.Feed]] = deque()
        requests = self.store.ahead(requests)

        def source() -> graph.Feed:
            while True:
                request = next(requests)
                feed = self._feed(request)
                if len(feed.ids):
                    in_flight.append((request, feed))
                    return feed

        pipeline = self._graph(source, batch_size=self.batch_size, threads=self.threads, prefetch=self.prefetch)
        try:
            while True:
                try:
                    batch = pipeline.run()
                except StopIteration:
                    return
                except RunError:  # of the source
                    raise
                except RuntimeError as error:
                    if not in_flight:
                        raise
                    batch = self._one_at_a_time(*in_flight.popleft(), error)
                    if not batch:
                        continue
                else:
                    in_flight.popleft()
                yield batch
        finally:
            self.store.close()

    def _graph(self, source: Callable[[], graph.Feed], *, batch_size: int, threads: int, prefetch: int) -> graph.Graph:
        return graph.Graph(
            self.views,
            source,
            seed=self.seed,
            batch_size=batch_size,
            threads=threads,
            prefetch=prefetch,
            device=self.device,
            target=self.target,
        )

    def _feed(self, request: Request) -> graph.Feed:
        """Read a request's samples, replacing or leaving out those that cannot be used."""
        found = [
            image or next(self._candidates(request, index), None) for index, image in enumerate(self._read(request.ids))
        ]
        usable = [image is not None for image in found]
        epochs = [epoch for epoch, here in zip(request.epochs, usable, strict=True) if here]
        return _as_feed(epochs, [image for image in found if image is not None])

    def _candidates(self, request: Request, index: int) -> Iterator[Image]:
        """What may stand in for request.ids[index] and can be read, in order; none where it may only be left out.

        Raises RunError at the end of them.
        """
        if request.replace is None:
            return
        for attempt in range(order.NUM_ATTEMPTS):
            (image,) = self._read(np.array([request.replace(index, attempt)]))
            if image is not None:
                yield image
        raise RunError(f"no usable sample in {order.NUM_ATTEMPTS} tries to replace sample {request.ids[index]}")

    def _read(self, ids: np.ndarray) -> list[Image | None]:
        """The images of ids (int64 [N]); None, and into quarantine, where one cannot be used."""
        # At once, and as lists: both are time that every step would pay a sample.
        rows = self.dataset.rows(ids, (self.target,) if self.target else ())
        places = zip(rows.shard.tolist(), rows.offset.tolist(), rows.size.tolist(), strict=True)
        found: list[Image | None] = []
        try:
            for sample, label, place in zip(ids.tolist(), rows.label.tolist(), places, strict=True):
                encoded = None if sample in self.quarantine else self._read_one(sample, *place)
                found.append(None if encoded is None else Image(sample, label, encoded, None))
            return self._with_targets(found, rows, self.target) if self.target else found
        finally:
            self.store.release()

    def _with_targets(self, found: list[Image | None], rows: Rows, kind: str) -> list[Image | None]:
        """The same with their targets, a blank one for an image that has none; None where one cannot be read."""
        offsets, sizes = rows.annotation_offset[kind].tolist(), rows.annotation_size[kind].tolist()
        places = zip(rows.shard.tolist(), offsets, sizes, strict=True)
        sides = zip(rows.height.tolist(), rows.width.tolist(), strict=True)
        with_targets: list[Image | None] = []
        for image, place, (height, width) in zip(found, places, sides, strict=True):
            if image is not None:
                has_one = place[-1] > 0
                target = self._read_one(image.id, *place) if has_one else annotations.blank(kind, height, width)
                image = None if target is None else image._replace(target=target)
            with_targets.append(image)
        return with_targets

    def _read_one(self, sample: int, shard: int, offset: int, size: int) -> bytes | None:
        try:
            encoded = self.store.read(shard, offset, size)
            header = images.read_header(encoded)
        except OSError as error:
            if self.quarantine.lasting and not isinstance(error, store.TornShardError):
                tar = locations.name(self.dataset.shard_paths[shard])
                raise RunError(f"{tar}: cannot be read: {error}; the same command goes on when it can") from error
            self._reject(sample, f"cannot be read: {error}")
            return None
        except images.ImageError as error:
            self._reject(sample, str(error))
            return None
        # Not the size in the index: the bytes may have changed since, and 30000x30000 pixels would take 6.5 GB.
        if header.height * header.width > self.max_pixels:
            size_px = f"{header.width}x{header.height}"
            self._reject(sample, f"{size_px} pixels are more than data.max_pixels={self.max_pixels}")
            return None
        return encoded

    def _reject(self, sample: int, reason: str) -> None:
        rows = self.dataset.rows(np.array([sample]))
        self.quarantine.add(
            {
                "source": self.quarantine.source,
                "id": sample,
                "shard": locations.name(self.dataset.shard_paths[int(rows.shard[0])]),
                "offset": int(rows.offset[0]),
                "key": self.dataset.keys(np.array([sample]))[0],
                "reason": reason,
            }
        )

    def _one_at_a_time(self, request: Request, feed: graph.Feed, error: RuntimeError) -> dict[str, torch.Tensor]:
        """Run a lost batch's samples one by one, putting those that fail into quarantine; {} where none is left."""
        singles = [self._first_that_runs(request, index, image) for index, image in enumerate(self._read(request.ids))]
        if not any(sample in self.quarantine for sample in feed.ids.tolist()):
            raise error  # no sample fails alone, so it was not the data
        usable = [single for single in singles if single is not None]
        return {name: torch.cat([single[name] for single in usable]) for name in (usable[0] if usable else ())}

    def _first_that_runs(self, request: Request, index: int, image: Image | None) -> dict[str, torch.Tensor] | None:
        """The views of `image`, request.ids[index], or of what replaces it; None where it may only be left out."""
        for candidate in itertools.chain([image] if image else [], self._candidates(request, index)):
            try:
                return self._run_single(_as_feed([request.epochs[index]], [candidate]))
            except RuntimeError as error:
                self._reject(candidate.id, f"cannot be decoded: {probe.reason(error)}")
        return None

    def _run_single(self, feed: graph.Feed) -> dict[str, torch.Tensor]:
        """The views of one sample. Raises RuntimeError where it cannot be decoded."""
        self._single_feed = feed
        if self._single is None:
            self._single = self._graph(lambda: self._single_feed, batch_size=1, threads=1, prefetch=1)
        return {name: tensor.clone() for name, tensor in self._single.run().items()}


def _as_feed(epochs: list[int], found: list[Image]) -> graph.Feed:
    ids = np.array([image.id for image in found], np.int64)
    labels = np.array([image.label for image in found], np.int64)
    targets = [image.target for image in found if image.target is not None]
    return graph.Feed(np.array(epochs, np.int64), ids, labels, [image.encoded for image in found], targets or None)
