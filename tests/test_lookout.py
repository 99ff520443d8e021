"""When ranks look whether to stop: at the same steps on all, often enough by the clock, and so that all stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from distssl import collectives, job, lookout, monitor, train
from distssl.config import Run
from distssl.context import Context
from distssl.data.shards import Dataset
from distssl.downstream import rows
from distssl.lookout import Lookout
from tests import runs


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.packed(tmp_path_factory.mktemp("photos"))


def looks(run_dir: Path, step_s: float, num_steps: int) -> list[int]:
    """The steps after which a rank looks where steps take so long on rank 0, and on others ever longer."""
    now = 0.0
    with pytest.MonkeyPatch.context() as patch, Context(run_dir) as context:
        patch.setattr(lookout.time, "perf_counter", lambda: now)
        out, found = Lookout(context, 0), []
        for step in range(1, num_steps + 1):
            now += step_s * (1 + collectives.rank() * step)
            if step == out.due:
                assert not out.look(step)
                found.append(step)
    return found


@pytest.mark.parametrize(
    ("step_s", "expected"), [(60.0, [1, 2, 3, 4, 5, 6, 7]), (2.0, [1, 3, 5, 7]), (1.5, [1, 4, 7]), (0.1, [1])]
)
def test_ranks_look_at_the_same_steps_as_often_as_the_steps_of_rank_0_ask_for(
    ranks, tmp_path: Path, step_s: float, expected: list[int]
) -> None:
    assert looks(tmp_path, step_s, 7) == expected
    assert ranks(2).run(looks, tmp_path, step_s, 7) == [expected] * 2


def stop_between_lines_of_the_log(run: Run) -> int:
    """The step at which a run ends that logs rarely, whose steps take long, and that is asked at its third."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, Context(run.run_dir) as context:
        patch.setattr(lookout, "EVERY_S", 0.0)
        training = train.Training(run, context, Dataset.open(Path(run.data.source)))
        context.stop_requested = lambda: training.step >= 3 and context.rank == 0  # type: ignore[method-assign]
        assert not training.run()
        return training.step


def test_a_run_stops_between_two_lines_of_the_log(ranks, packed: Path, tmp_path: Path) -> None:
    run = runs.tiny(packed, tmp_path, "train.epochs=1", "train.log_every=1000")
    assert ranks(2).run(stop_between_lines_of_the_log, run) == [3, 3]
    assert monitor.read_jsonl(run.run_dir / monitor.METRICS) == []


def evaluated(run: Run, folders: job.Folders, stop: bool) -> bool:
    """`job.pretrain`, where somebody asks to stop once the first figures are there."""
    with Context(run.run_dir) as context:
        if stop:
            context.stop_requested = lambda: bool(rows.read_summary(run.run_dir))  # type: ignore[method-assign]
        return job.pretrain(run, context, folders)


def test_a_stop_is_seen_between_rows_of_the_final_evaluation(ranks, packed: Path, tmp_path: Path) -> None:
    settings = ["train.epochs=1", "eval.tasks=[knn,linear]", "eval.labels=[null]", "eval.num_seeds=1"]
    run = runs.tiny(packed, tmp_path, *settings)
    folders = job.prepare(run, 2)
    assert ranks(2).run(evaluated, run, folders, True) == [False, False]
    done = [(row.backbone, row.task) for row in rows.read_summary(run.run_dir)]
    assert set(done) == {("random", "knn")}
    assert ranks(2).run(evaluated, run, folders, False) == [True, True]
    done = [(row.backbone, row.task) for row in rows.read_summary(run.run_dir)]
    assert set(done) == {(name, task) for name in ("random", "pretrained") for task in ("knn", "linear")}
