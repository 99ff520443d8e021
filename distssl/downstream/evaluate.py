"""What a backbone is worth on labelled images: each task by one recipe for every backbone, as rows of figures.

Backbones: *random*, the run's network as initialised; *pretrained*, its newest checkpoint; *supervised*, the same
network trained on the labels from its initialisation. Tasks on frozen features take a supervised backbone that has
learned from all training labels. Tasks that train a network train it whole, but for the random backbone, of which only
the head learns: its row says what the architecture gives by itself.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from distssl import collectives, config, method, weights
from distssl.config import Run
from distssl.context import Context
from distssl.data.shards import Dataset
from distssl.downstream import classify, cluster, features, fit, labels, needs, pictures, retrieve
from distssl.downstream.features import Features
from distssl.downstream.fit import Fitting, Job
from distssl.downstream.labels import Labelled
from distssl.downstream.rows import Row
from distssl.downstream.task import Facts, Recipe
from distssl.nn.backbones import Backbone

log = logging.getLogger(__name__)

MOST_ONLINE = 5000  # training features of the kNN evaluation during pretraining, and a fifth of it for the test
FEATURES, FITS = "features", "fits"  # folders in the run folder


class Evaluation:
    """Evaluates the backbones of one run on one labelled dataset.

    trained: the method at a checkpoint, for the pretrained rows.
    """

    def __init__(
        self, run: Run, context: Context, train: Dataset, test: Dataset | None, trained: method.Method | None = None
    ) -> None:
        self.run, self.cfg, self.context = run, run.eval, context
        self.train, self.test = train, test
        self.trained = trained
        self.how = features.Extraction.of_run(run, context.device)
        self.name = needs.name(run)
        both = f"{train.fingerprint} {(test or train).fingerprint}"
        self.fingerprint = hashlib.sha256(both.encode()).hexdigest()[:12]
        self._labelled: dict[str, Labelled] = {}  # by kind; made once, as the next three
        self._facts: dict[str, Facts] = {}  # by task
        self._extracted: dict[str, tuple[Features, Features]] = {}  # by backbone
        self._clusters: dict[tuple[str, int], np.ndarray] = {}  # by backbone and seed

    def missing(self, tasks: Sequence[str]) -> dict[str, str]:
        """Those of the tasks for which there are no labels to train or to test on: what would be right."""
        sets = [self.train, self.test or self.train]
        return {task: right for task in tasks for right in [needs.missing(self.run, sets, needs.kind(task))] if right}

    def check(self, task: str) -> None:
        """Raises ConfigError where there are no labels for a task, or wrong ones."""
        facts = needs.check(task, self.run, self.labelled(needs.kind(task)))
        if facts:
            self._facts[task] = facts

    def labelled(self, kind: str) -> Labelled:
        """Raises ConfigError where there are no labels of this kind."""
        if kind not in self._labelled:
            self._labelled[kind] = needs.labelled(self.run, self.train, self.test, kind)
        return self._labelled[kind]

    def online(self, backbone: Backbone) -> dict[str, float]:
        """kNN accuracy on at most MOST_ONLINE images, for a point on the training curve. Every rank calls it."""
        data = self.labelled(labels.LABEL)
        ids = labels.subset(data.train_ids, MOST_ONLINE, 0), labels.subset(data.test_ids, MOST_ONLINE // 5, 0)
        train, test = (
            features.extract(backbone, dataset, some, self.how, self.context)
            for dataset, some in zip((data.train, data.test), ids, strict=True)
        )
        return {"knn": classify.knn(train, test, neighbours=self.cfg.neighbours, context=self.context)["accuracy"]}

    def rows(self, tasks: Sequence[str], backbones: Sequence[str]) -> Iterator[list[Row]]:
        """Backbone by backbone and task by task, the figures as they are there. Every rank calls it and gets them."""
        for name in backbones:
            for task in tasks:
                yield self._rows(name, task)
            if any(task in config.FROZEN_TASKS for task in tasks):
                self._draw(name, clusters="cluster" in tasks)

    def backbone(self, name: str, seed: int = 0) -> Backbone:
        """A copy of one of the backbones; the random one has other weights for another seed."""
        if name == "pretrained":
            assert self.trained is not None
            found = copy.deepcopy(self.trained.evaluated())
            found.micro_batches = None  # those of the pretraining's batch
            return found
        if name == "supervised":
            return self._supervised()
        return method.build(self.run.model_copy(update={"seed": self.run.seed + seed})).evaluated()

    def figure(
        self,
        task: str,
        name: str,
        how_many: int | str | None,
        seed: int,
        report: fit.Report | None = None,
        every: int | None = None,
    ) -> dict[str, float]:
        """The metrics of one backbone on one task with so many labels. Every rank calls it and gets them.

        report: called with the step and the metrics after each `every` steps, where a network is trained.
        """
        if task in config.FITTED_TASKS:
            return self._fitted(task, name, how_many, seed, report, every)
        train, test = self._features(name)
        few = train.only(labels.few(train.ids, train.labels, how_many, seed))
        if task == "knn":
            return classify.knn(few, test, neighbours=self.cfg.neighbours, context=self.context)
        if task == "linear":
            return classify.linear(few, test, inverse_l2=self.cfg.inverse_l2, context=self.context)
        if task == "retrieval":
            return retrieve.retrieve(few, test, self.context)
        return cluster.agreement(self._cluster(name, seed), test.labels)

    def _features(self, name: str) -> tuple[Features, Features]:
        """Of the training and the test images, by a backbone."""
        if name not in self._extracted:
            data, backbone = self.labelled(labels.LABEL), self.backbone(name)
            train, test = (
                features.extract(backbone, dataset, ids, self.how, self.context, self.context.run_dir / FEATURES)
                for dataset, ids in data.parts
            )
            self._extracted[name] = train, test
        return self._extracted[name]

    def _cluster(self, name: str, seed: int) -> np.ndarray:
        """The cluster of each test image, by a backbone."""
        if (name, seed) not in self._clusters:
            self._clusters[name, seed] = cluster.cluster(self._features(name)[1], self.context, seed)
        return self._clusters[name, seed]

    def _rows(self, name: str, task: str) -> list[Row]:
        """A row for each number of labels and metric, over seeds."""
        data = self.labelled(needs.kind(task))
        rows: dict[tuple[int | None, int | None], list[Row]] = {}
        for how_many in self.cfg.labels if task in needs.WITH_FEW_LABELS else (None,):
            number = len(needs.few(data, needs.kind(task), how_many, 0))
            number = None if number == len(data.train_ids) else number
            per_class = labels.per_class(how_many) if number else None
            if (number, per_class) in rows:  # "1%" is a number too
                continue
            draws_labels = task in ("knn", "linear") and number is not None
            seeds = self.cfg.num_seeds if draws_labels or task not in ("knn", "linear", "retrieval") else 1
            found = [self.figure(task, name, how_many, seed) for seed in range(seeds)]
            rows[number, per_class] = [
                Row(name, task, number, metric, values, self.name, per_class, self.fingerprint)
                for metric in found[0]
                for values in [tuple(metrics[metric] for metrics in found)]
            ]
        return [row for group in rows.values() for row in group]

    def _draw(self, name: str, clusters: bool) -> None:
        """Pictures of what the features do, by rank 0."""
        data, (train, test) = self.labelled(labels.LABEL), self._features(name)
        found = self._cluster(name, seed=0) if clusters else None
        if self.context.rank == 0:
            pictures.neighbours(self.context, data, train, test, self.how, name)
            if found is not None:
                pictures.clusters(self.context, data, found, test, self.how, name)
            if name == "pretrained":
                pictures.projector(self.context, data, test, self.how)
        collectives.barrier()

    def _fitted(
        self, task: str, name: str, how_many: int | str | None, seed: int, report: fit.Report | None, every: int | None
    ) -> dict[str, float]:
        """From the job's folder where it was done before."""
        job, start = self._job(task, name, how_many, seed)
        with self.context.one_writer(job.folder):
            found = fit.result(job.folder, self.context)
            if found is None:
                fitting = self._fitting(task, name, job, start)
                fitting.run(report, every)
                found = fitting.score()
                if seed == 0 and self.context.rank == 0:
                    pictures.of_network(self.context, fitting, task, name, self.name)
                of_all = len(job.train_ids) == len(self.labelled(needs.kind(task)).train_ids)
                is_supervised = (task, name, seed) == ("finetune", "supervised", 0) and of_all  # of `_supervised`
                fit.finish(job.folder, found, self.context, keeps_network=is_supervised)
            elif report:
                fit.repeat_reports(job.folder, report)
        return found

    def _supervised(self) -> Backbone:
        """The network trained on all labels, of which the checkpoint is kept."""
        job, start = self._job("finetune", "supervised", None, 0)
        with self.context.one_writer(job.folder):
            fitting = self._fitting("finetune", "supervised", job, start)
            fitting.run()
        return fitting.network.backbone

    def _job(self, task: str, name: str, how_many: int | str | None, seed: int) -> tuple[Job, Backbone]:
        """A network to train, and what it begins with: for the supervised rows too that is the untrained backbone."""
        data, recipe = self.labelled(needs.kind(task)), self._recipe(task, name)
        start = self.backbone("random" if name == "supervised" else name, seed)
        ids = needs.few(data, needs.kind(task), how_many, seed)
        facts = [task, name, seed, recipe, data.train.fingerprint, data.test.fingerprint, self.cfg.num_classes]
        facts += [ids.tolist(), data.test_ids.tolist(), weights.digest(start.state_dict())]
        facts += [self.run.seed, str(self.how.dtype), self.how.max_pixels, self.how.network]
        digest = hashlib.sha256(json.dumps(facts, default=dataclasses.asdict).encode()).hexdigest()[:12]
        title = f"{task} on {len(ids)} of {self.name}, {name} backbone, seed {seed}"
        folder = self.context.run_dir / FITS / f"{task}_{self.name}_{name}_{len(ids)}_seed{seed}_{digest}"
        return Job(title, folder, data.train, ids, data.test, data.test_ids, seed), start

    def _fitting(self, task: str, name: str, job: Job, start: Backbone) -> Fitting:
        chosen, recipe = needs.network(task), self._recipe(task, name)
        if task not in self._facts:
            self._facts[task] = chosen.facts_of(self.labelled(chosen.kind), self.cfg.num_classes)
        built = method.seeded(self.run.seed + job.seed, lambda: chosen(start, self._facts[task], recipe))
        return Fitting(built, job, self.how, self.context)

    def _recipe(self, task: str, name: str) -> Recipe:
        own = needs.network(task).recipe
        if task == "finetune":
            own = dataclasses.replace(own, size_px=self.how.size_px, crop=self.how.crop)
        asked = own.asked(self.cfg.fit)
        trained = {"random": "head", "supervised": "all"}.get(name, asked.trained)
        return dataclasses.replace(asked, trained=trained)
