"""The jobs of the command line on one rank: train a backbone, and show what the training bought."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from distssl import atomic, collectives, config, lookout, method, mirrored, plan, run_folder, train, weights
from distssl.config import Run
from distssl.context import Context, stop_file
from distssl.data import shards
from distssl.data.locations import Place
from distssl.data.shards import Dataset
from distssl.downstream import evaluate, fit, labels, needs, pictures, rows
from distssl.errors import ConfigError
from distssl.mirror import Mirror
from distssl.remote import Remote
from distssl.run_folder import CONFIG
from distssl.weights import Weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folders:
    """The packed or indexed datasets of a run; None where there are no labels, or no test set of their own."""

    data: Place
    labelled: Place | None  # for a method that learns from labels too
    eval_train: Place | None
    eval_test: Place | None


def prepare(run: Run, world_size: int) -> Folders:
    """Check that the run can start, pack or index what it reads, and claim its folder; once, before its workers start.

    Raises ConfigError, with the run folder as it was, for a folder that holds another run and for a model, sources or
    sizes that cannot be used.
    """
    there = _config_there(run)
    run, start = run_folder.start_of(run, there)
    _refuse_another(run, there)
    built = method.build(run, start)
    of_labels = {"data.labelled": run.data.labelled, "data.num_labelled": run.data.num_labelled}
    for key, value in of_labels.items():
        if value and not built.learns_from_labels:
            raise ConfigError(f"{key}={value}: {run.method.name} learns from no labels; leave it out")
    if (size := run.train.micro_batch) and built.learns_from_labels:
        raise ConfigError(f"train.micro_batch={size}: {run.method.name} mixes two streams; leave it out")
    ready = folders(run)
    _check_labels(run, ready, world_size)
    data, judged_on = Dataset.open(ready.data, run.machine), (ready.eval_train, ready.eval_test)
    plan.of_run(run, data, world_size)
    if ready.labelled:
        labelled = Dataset.open(ready.labelled, run.machine)
        built.check_labels(built.cfg, len(labelled.classes))
        plan.of_labelled(run, labelled, world_size)
        needs.require_names(run, run.data.labelled or run.data.source, ready.labelled, *judged_on)
    if built.reads_masks(built.cfg):
        if not labels.has(data, "mask"):
            raise ConfigError(f"data.source={run.data.source}: has no masks; {labels.WHERE['mask']} is right")
        needs.require_names(run, run.data.source, ready.data, *judged_on)
    is_kept = there is not None and (run.run_dir / weights.KEPT).exists()
    _claim(run, None if is_kept else start)
    return ready


def _check_labels(run: Run, ready: Folders, world_size: int) -> None:
    """Labels must be right for each task, and those that the user names be there, before anything is trained."""
    if ready.eval_train:
        train = Dataset.open(ready.eval_train, run.machine)
        test = Dataset.open(ready.eval_test, run.machine) if ready.eval_test else None
        for task in run.eval.tasks:
            kind = needs.kind(task)
            if run.eval.source or labels.has(train, kind):
                needs.check(task, run, needs.labelled(run, train, test, kind))
        needs.check_batches(run, train, test, world_size)
        if all(labels.has(each, labels.LABEL) for each in (train, test or train)):  # kNN on the way
            needs.labelled(run, train, test, labels.LABEL)


def _refuse_another(run: Run, there: Run | None) -> None:
    differs = config.differences(there, run) if there else []
    if differs:
        mistakes = (f"{run.run_url or run.run_dir} holds another run: {line}" for line in differs)
        raise ConfigError(*mistakes, "say name=ANOTHER to start a new run beside it")


def _config_there(run: Run) -> Run | None:
    """The config that the run folder has. With a URL: also that it can be used, now and not after hours."""
    if run.run_url is None:
        with _storage_named(run):
            path = run.run_dir / CONFIG
            found = path.read_text() if path.exists() else None
    else:
        there = Remote(run.run_url)
        data = there.read(CONFIG)
        there.check()
        found = None if data is None else data.decode()
    return None if found is None else config.parse(found, f"{run.run_url or run.run_dir}/{CONFIG}")


def _claim(run: Run, start: Weights | None) -> None:
    """Write the config, and before it what the run starts from, into the run folder.

    And forget that somebody asked an earlier start of it to stop. Raises ConfigError where another process trains it.
    """
    with _storage_named(run):
        run.run_dir.mkdir(parents=True, exist_ok=True)
        with run_folder.alone(run):
            if start:
                start.keep(run.run_dir)
            with atomic.replacing(run.run_dir / CONFIG) as file:
                file.write_text(config.dump(run))
            stop_file(run.run_dir).unlink(missing_ok=True)
    if run.run_url:
        for name in ([weights.KEPT] if start else []) + [CONFIG]:
            Remote(run.run_url).put(name, run.run_dir / name)


@contextmanager
def _storage_named(run: Run) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"machine.storage={run.machine.storage}: {run.run_dir} cannot be used: {error.strerror}"
        ) from None


def folders(run: Run, tasks: Sequence[str] | None = None) -> Folders:
    """Pack or index the sources that are not ready yet, of a run and its evaluations.

    tasks: of an evaluation alone, which does not look at the pretraining data where it has others; () for none.
    """
    prepared = functools.partial(shards.prepare, cache_dir=run.machine.cache, retry_s=run.machine.retry_s)
    trains, tasks = not tasks, run.eval.tasks if tasks is None else tasks
    eval_train = prepared(run.eval.source, key="eval.source") if tasks and run.eval.source else None
    data = eval_train if eval_train and not trains else prepared(run.data.source)
    labelled = None
    if trains and method.find(run.method.name).learns_from_labels:
        labelled = prepared(run.data.labelled, key="data.labelled") if run.data.labelled else data
    if not tasks:
        return Folders(data, labelled, None, None)
    eval_train = eval_train or data
    needed = {needs.kind(task) for task in tasks}
    if not run.eval.source and not any(labels.has(Dataset.open(eval_train, run.machine), kind) for kind in needed):
        return Folders(data, labelled, None, None)
    eval_test = prepared(run.eval.test_source, key="eval.test_source") if run.eval.test_source else None
    return Folders(data, labelled, eval_train, eval_test)


def pretrain(run: Run, context: Context, data: Folders) -> bool:
    """Train from where the run folder is, then evaluate; False where somebody asked to stop before the end."""
    with run_folder.trained_in(run, context):
        finished = _pretrain(_as_claimed(run, context), context, data)
        context.wait()  # for the last checkpoint, after which nothing changes
    return finished


def _as_claimed(run: Run, context: Context) -> Run:
    """The run with the digest that `prepare` has found of the weights it starts from."""
    if run.model.init is None:
        return run
    text = (context.run_dir / CONFIG).read_text() if context.rank == 0 else ""
    return run_folder.starting_from(run, config.parse(collectives.broadcast_object(text), CONFIG).model.init_sha256)


def _pretrain(run: Run, context: Context, data: Folders) -> bool:
    judge = _judge(run, context, data)
    online = judge.online if judge and not judge.missing(["knn"]) else None
    labelled = Dataset.open(data.labelled, run.machine) if data.labelled else None
    elsewhere = functools.partial(_online, run, data) if online else None
    training = train.Training(run, context, Dataset.open(data.data, run.machine), online, labelled, elsewhere)
    if not training.run():
        return False
    if judge:
        judge.trained = training.method
        tasks = _possible(judge, context, run.eval.tasks)
        backbones = run.eval.backbones or ("random", "pretrained")
        return _score(judge, context, tasks, backbones, lambda: lookout.asked(context))
    return True


def _online(run: Run, data: Folders, state: dict[str, Tensor]) -> dict[str, float]:
    """What `Evaluation.online` finds of a backbone with this state, in a process of its own."""
    with Context(run.run_dir) as alone:
        judge = _judge(run, alone, data)
        assert judge is not None
        backbone = method.build(run).evaluated()
        backbone.load_state_dict(state)
        return judge.online(backbone)


def evaluate_run(run: Run, context: Context, tasks: Sequence[str] | None, data: Folders | None = None) -> None:
    """Evaluate backbones of a run on tasks, or on all that the labels allow, into summary.json.

    data: `folders` of the run for these tasks, where somebody has made them already.

    Raises ConfigError without labels, or without a checkpoint where the pretrained backbone is one of them.
    """
    _open_mirror(run, context)
    judge = _judge(run, context, data or folders(run, tasks or config.TASKS))
    if judge is None:
        raise ConfigError(f"eval.source: {run.data.source} has no labels; say eval.source=LABELLED_IMAGES")
    backbones = run.eval.backbones or rows.BACKBONES
    if "pretrained" in backbones:
        judge.trained = _newest(run, context)
    tasks = tasks or _possible(judge, context, config.TASKS)
    if not tasks:
        raise ConfigError(f"eval.source={run.eval.source}: has labels of no task; labelled images are right")
    for task in tasks:
        judge.check(task)
    _score(judge, context, tasks, backbones)


def _possible(judge: evaluate.Evaluation, context: Context, tasks: Sequence[str]) -> list[str]:
    """Those of the tasks for which there are labels; rank 0 names the others."""
    missing = judge.missing(tasks)
    if missing and context.rank == 0:
        named = (f"{task} ({right})" for task, right in missing.items())
        log.info("not evaluated, for there are no labels of these kinds: %s", ", ".join(named))
    return [task for task in tasks if task not in missing]


def evaluate_once(
    run: Run,
    context: Context,
    task: str,
    backbone: str,
    labels: int | str | None,
    report: fit.Report | None = None,
    every: int | None = None,
) -> dict[str, float]:
    """The metrics of one backbone of a run on one task with so many labels, as `evaluate_run` finds them at seed 0."""
    _open_mirror(run, context)
    judge = _judge(run, context, folders(run, [task]))
    if judge is None:
        raise ConfigError(f"eval.source: {run.data.source} has no labels; say eval.source=LABELLED_IMAGES")
    if backbone == "pretrained":
        judge.trained = _newest(run, context)
    return judge.figure(task, backbone, labels, 0, report, every)


def _open_mirror(run: Run, context: Context) -> None:
    """For a run that is only looked at: its files are taken and put as they are needed."""
    if run.run_url:
        context.mirror = Mirror(context.run_dir, run.run_url)


def _newest(run: Run, context: Context) -> method.Method:
    """The method as the run's newest checkpoint has it, the same on every rank. Every rank calls it."""
    return run_folder.at(mirrored.newest(context, context.run_dir), run, run.run_url or context.run_dir)


def _judge(run: Run, context: Context, data: Folders) -> evaluate.Evaluation | None:
    if data.eval_train is None:
        return None
    test = Dataset.open(data.eval_test, run.machine) if data.eval_test else None
    return evaluate.Evaluation(run, context, Dataset.open(data.eval_train, run.machine), test)


def _score(
    judge: evaluate.Evaluation,
    context: Context,
    tasks: Sequence[str],
    backbones: Sequence[str],
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Rows into summary.json as they are there; False where it was to stop before the last."""
    rows_left = judge.rows(tasks, backbones)
    while not stop():
        found = next(rows_left, None)
        if found is None:
            return True
        if context.rank == 0:
            _keep_rows(context, found)
    return False


def _keep_rows(context: Context, found: Sequence[rows.Row]) -> None:
    remote = context.mirror
    if remote is None:
        rows.write_summary(context.run_dir, found)
        return
    with remote.lock:
        remote.pull_file(rows.SUMMARY)  # to which others may have added
        rows.write_summary(context.run_dir, found)
        remote.put(rows.SUMMARY)
        remote.push(pictures.FOLDER)
