"""The jobs of the command line on one rank: train a backbone, and show what the training bought."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from distssl import atomic, checkpoint, config, method, plan, train
from distssl.config import Run
from distssl.context import Context, stop_file
from distssl.data import shards
from distssl.data.shards import Dataset
from distssl.downstream import evaluate
from distssl.errors import ConfigError

CONFIG = "config.yaml"


@dataclass(frozen=True)
class Folders:
    """The packed or indexed datasets of a run; None where there are no labels, or no test set of their own."""

    data: Path
    labelled: Path | None  # for a method that learns from labels too
    eval_train: Path | None
    eval_test: Path | None


def prepare(run: Run, world_size: int) -> Folders:
    """Check that the run can start, pack or index what it reads, and claim its folder; once, before its workers start.

    Raises ConfigError, with the run folder as it was, for a folder that holds another run and for a model, sources or
    sizes that cannot be used.
    """
    _refuse_another(run)
    built = method.build(run)
    if run.data.labelled and not built.learns_from_labels:
        raise ConfigError(f"data.labelled={run.data.labelled}: {run.method.name} learns from no labels; leave it out")
    if run.train.micro_batch and built.learns_from_labels:
        raise ConfigError(
            f"train.micro_batch={run.train.micro_batch}: {run.method.name} mixes two streams; leave it out"
        )
    ready = folders(run)
    plan.of_run(run, Dataset.open(ready.data), world_size)
    if ready.labelled:
        plan.of_labelled(run, Dataset.open(ready.labelled), world_size)
    _claim(run)
    return ready


def _refuse_another(run: Run) -> None:
    path = run.run_dir / CONFIG
    with _storage_named(run):
        differs = config.differences(config.parse(path.read_text()), run) if path.exists() else []
    if differs:
        mistakes = (f"{run.run_dir} holds another run: {line}" for line in differs)
        raise ConfigError(*mistakes, "say name=ANOTHER to start a new run beside it")


def _claim(run: Run) -> None:
    """Write the config into the run folder, and forget that somebody asked an earlier start of it to stop."""
    with _storage_named(run):
        run.run_dir.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(run.run_dir / CONFIG) as file:
            file.write_text(config.dump(run))
        stop_file(run.run_dir).unlink(missing_ok=True)


@contextmanager
def _storage_named(run: Run) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"machine.storage={run.machine.storage}: {run.run_dir} cannot be used: {error.strerror}"
        ) from None


def folders(run: Run) -> Folders:
    """Pack or index the sources of a run that are not ready yet."""
    cache = run.machine.cache
    data = shards.prepare(run.data.source, cache)
    labelled = None
    if method.find(run.method.name).learns_from_labels:
        labelled = shards.prepare(run.data.labelled, cache, key="data.labelled") if run.data.labelled else data
    if not run.eval.tasks:
        return Folders(data, labelled, None, None)
    eval_train = shards.prepare(run.eval.source, cache, key="eval.source") if run.eval.source else data
    if not Dataset.open(eval_train).num_labelled and not run.eval.source:
        return Folders(data, labelled, None, None)
    return Folders(
        data,
        labelled,
        eval_train,
        shards.prepare(run.eval.test_source, cache, key="eval.test_source") if run.eval.test_source else None,
    )


def pretrain(run: Run, context: Context, data: Folders) -> bool:
    """Train from where the run folder is, then evaluate; False where somebody asked to stop before the end."""
    judge = _judge(run, context, data)
    labelled = Dataset.open(data.labelled) if data.labelled else None
    training = train.Training(run, context, Dataset.open(data.data), judge.online if judge else None, labelled)
    if not training.run():
        return False
    if judge:
        _score(judge, run, context, training.method, run.eval.tasks)
    return True


def evaluate_run(run: Run, context: Context, tasks: Sequence[str]) -> None:
    """Evaluate the newest checkpoint of a run and the same backbone untrained. Raises ConfigError without either."""
    judge = _judge(run, context, folders(run))
    if judge is None:
        raise ConfigError(f"eval.source: {run.data.source} has no labels; say eval.source=LABELLED_IMAGES")
    _score(judge, run, context, trained(run, context.run_dir), tasks)


def trained(run: Run, run_dir: Path) -> method.Method:
    """The method as the newest checkpoint in a run folder has it. Raises ConfigError where there is none."""
    state = checkpoint.newest(run_dir)
    if state is None:
        raise ConfigError(f"{run_dir}: no checkpoint yet")
    built = method.build(run)
    built.load_state_dict(state["model"])
    return built


def _judge(run: Run, context: Context, data: Folders) -> evaluate.Evaluation | None:
    if data.eval_train is None:
        return None
    test = Dataset.open(data.eval_test) if data.eval_test else None
    return evaluate.Evaluation(run, evaluate.labelled(Dataset.open(data.eval_train), test), context)


def _score(
    judge: evaluate.Evaluation, run: Run, context: Context, trained: method.Method, tasks: Sequence[str]
) -> None:
    """Rows of the untrained and of the trained backbone, by the same recipe, into summary.json."""
    rows = judge.rows("random", method.build(run).evaluated(), tasks)
    rows += judge.rows("pretrained", trained.evaluated(), tasks)
    if context.rank == 0:
        evaluate.write_summary(context.run_dir, rows)
