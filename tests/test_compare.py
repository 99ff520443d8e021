"""Runs side by side: the table, the report as Chromium shows it, and TensorBoard as Chromium shows it."""

from __future__ import annotations

import importlib
import math
import re
import shlex
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from distssl import board, compare, config, monitor, svg, terminal
from distssl.compare import Column
from distssl.config import Run
from distssl.downstream import rows
from distssl.downstream.rows import Row
from distssl.errors import ConfigError
from tests import browser
from tests.browser import Browser

launch = importlib.import_module("launch")

KNN = Column("photos", "knn", "accuracy", 10, "10")
KNN_ALL = Column("photos", "knn", "accuracy", None, "all")
DEPTH = Column("rooms", "depth", "rmse", None, "all")
RANDOM = [
    Row("random", "knn", 10, "accuracy", (0.2, 0.3), "photos"),
    Row("random", "knn", None, "accuracy", (0.35,), "photos"),
]
# 0.625 and 0.75 have no rounding, so that the page's figures can be compared with them as they are.
ALPHA = [
    Row("pretrained", "knn", 10, "accuracy", (0.5, 0.75), "photos"),
    Row("pretrained", "knn", None, "accuracy", (0.75,), "photos"),
    Row("pretrained", "depth", None, "rmse", (0.5,), "rooms"),
]
BETA = [
    Row("pretrained", "knn", 10, "accuracy", (0.5, 0.5), "photos"),
    Row("pretrained", "knn", None, "accuracy", (0.875,), "photos"),
    Row("pretrained", "depth", None, "rmse", (0.25,), "rooms"),
    Row("supervised", "knn", 10, "accuracy", (0.5625,), "photos"),
]


def run_folder(folder: Path, found: list[Row], *, seed: int = 0, lr: float = 0.1, num_steps: int = 5) -> Path:
    """What a run leaves behind: config, figures, curves for the report and for TensorBoard, pictures, the projector."""
    (folder / "pictures").mkdir(parents=True)
    tree = {"name": folder.name, "seed": seed, "data": {"source": "photos"}, "train": {"lr": lr}}
    (folder / "config.yaml").write_text(config.dump(Run.model_validate(tree)))
    if found:
        rows.write_summary(folder, found)
    record = monitor.Monitor(folder, 0)
    for step in range(1, num_steps + 1):
        record.log(step, {"loss": 8 / step, "lr": lr} | ({"knn": 0.125 * step} if step % 2 else {}))
    record.close()
    colours = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(colours).save(folder / "pictures" / "neighbours_photos_pretrained.png")
    labels = np.arange(9) % 3
    thumbnails = np.broadcast_to(np.uint8(80 * labels)[:, None, None, None], (9, 32, 32, 3))
    x = np.random.default_rng(seed).normal(size=(9, 6)).astype(np.float32)
    classes = np.array(["cat", "dog", "a\tbird"])
    np.savez(folder / "pictures" / "projector.npz", x=x, labels=labels, thumbnails=thumbnails, classes=classes)
    return folder


@dataclass(frozen=True)
class Done:
    """alpha and beta as `compare` left them, and what it said."""

    folders: list[Path]
    out: Path
    said: str


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    storage = tmp_path_factory.mktemp("runs")
    folders = [
        run_folder(storage / "alpha", [*ALPHA, *RANDOM]),
        run_folder(storage / "beta", [*BETA, *RANDOM], lr=0.2, num_steps=7),
    ]
    with pytest.MonkeyPatch.context() as patch:
        console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        patch.setattr(launch, "console", console)
        with closing(console.file), pytest.raises(SystemExit) as left:
            launch.main(["compare", *map(str, folders)])
    assert left.value.code == 0
    return Done(folders, storage / "compare", console.export_text())


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser.started(tmp_path_factory.mktemp("browser") / "profile") as started:
        yield started


def test_the_best_of_a_column_is_the_highest_or_of_an_error_the_lowest(done: Done) -> None:
    found = compare.collect(done.folders)
    assert found.columns == [KNN, KNN_ALL, DEPTH]
    assert [line.name for line in found.lines] == ["alpha", "beta", "random", "supervised"]
    assert [found.best(column) for column in found.columns] == [0.625, 0.875, 0.25]
    best = [[line.name for line in found.lines if found.is_best(line, column)] for column in found.columns]
    assert best == [["alpha"], ["beta"], ["beta"]]


def test_a_single_figure_and_one_that_is_no_number_are_not_the_best(tmp_path: Path) -> None:
    nan = [Row("pretrained", "knn", 10, "accuracy", (math.nan,), "photos")]
    folders = [run_folder(tmp_path / "alpha", ALPHA), run_folder(tmp_path / "broken", nan)]
    found = compare.collect(folders)
    assert [found.best(column) for column in found.columns] == [None, None, None]


def test_random_rows_are_one_line_only_where_backbone_seed_and_figures_agree(tmp_path: Path) -> None:
    more = [*RANDOM, Row("random", "depth", None, "rmse", (0.9,), "rooms")]
    other = [Row("random", "knn", 10, "accuracy", (0.2, 0.4), "photos")]
    elsewhere = [Row("random", "knn", 10, "accuracy", (0.2, 0.3), "buses")]
    cases = {"a": (RANDOM, 0), "b": (more, 0), "c": (other, 0), "d": (RANDOM, 1), "e": (elsewhere, 0)}
    folders = [run_folder(tmp_path / name, [*ALPHA, *found], seed=seed) for name, (found, seed) in cases.items()]
    lines = [line for line in compare.collect(folders).lines if line.backbone == "random"]
    assert [line.runs for line in lines] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [line.name for line in lines] == ["random (a and 1 more)", "random (c)", "random (d)", "random (e)"]
    assert set(lines[0].cells) == {KNN, KNN_ALL, DEPTH}


def test_runs_of_one_name_are_told_apart_by_the_folder_above(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / above / "demo", ALPHA) for above in ("x", "y")]
    assert [member.name for member in compare.collect([*folders, folders[0]]).members] == ["x/demo", "y/demo"]


def test_only_what_differs_is_among_the_settings(done: Done) -> None:
    assert compare.collect(done.folders).settings == {"method.name": ["simclr", "simclr"], "train.lr": [0.1, 0.2]}


def test_the_terminal_shows_the_table_in_80_columns(done: Done) -> None:
    said = done.said
    tables = [line for line in said.splitlines() if line.startswith(("│", "┃"))]
    assert tables
    assert max(map(len, tables)) <= 80
    # Of two values a, b the 95 % interval is 12.706 * |a - b| / 2 to either side: Student's t with one degree.
    assert re.search(r"alpha +│ 62\.5 ±158\.8 │ +75\.0 │ +0\.500 │", said), said
    assert re.search(r"random +│ +25\.0 ±63\.5 │ +35\.0 │ +│", said), said
    # (8 / step - 8 / 7) / (8 - 8 / 7) * 7 is 7, 2.9, 1.6, 0.9, 0.5, 0.2, 0.
    assert re.search(r"beta +│ loss +│ █▄▃▂▁▁▁ +│ +8 │ 1\.143 │ +7 │", said), said


def test_a_table_too_wide_is_cut_by_task(tmp_path: Path) -> None:
    tasks = ("knn", "linear", "finetune")
    wide = [
        Row("pretrained", task, number, "accuracy", (0.5, 0.6, 0.7), "photos")
        for task in tasks
        for number in (10, 100, 1000, 10000, None)
    ]
    found = compare.collect([run_folder(tmp_path / "alpha", wide)])
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with closing(console.file):
        terminal.show(found, console)
    said = console.export_text()
    assert [task for task in tasks if f"photos {task}: best in bold" in said] == list(tasks)
    assert "…" not in said
    assert max(len(line) for line in said.splitlines() if line.startswith("│")) <= 80
    assert said.count("60.0 ±24.8") == 15 + 6  # in the table, and both ends of three curves over labels
    # t = 4.303 with two degrees, s = 0.1: 4.303 * 0.1 / sqrt(3)


def test_figures_over_numbers_of_labels_have_one_scale(tmp_path: Path) -> None:
    figures = {"pretrained": (0.30, 0.65, 1.0), "random": (0.30, 0.30, 0.40), "supervised": (0.3, 0.4)}
    labels = (10, 100, None)
    rows = [
        Row(backbone, "linear", number, "accuracy", (value,), "photos")
        for backbone, values in figures.items()
        for number, value in zip(labels, values, strict=False)
    ]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with closing(console.file):
        terminal.show(compare.collect([run_folder(tmp_path / "alpha", rows)]), console)
    said = console.export_text().partition("over numbers of labels")[2].partition("training")[0]
    found = re.findall(r"photos linear accuracy │ (\w+) +│ 10, 100, all │ (\S+) +│ +(\S+) │ +(\S+) │", said)
    assert found == [("alpha", "▁▅█", "30.0", "100.0"), ("random", "▁▁▂", "30.0", "40.0")]  # none is half a curve


def test_what_is_no_run_and_runs_without_figures_are_told(tmp_path: Path) -> None:
    empty = run_folder(tmp_path / "empty", [])
    with pytest.raises(ConfigError) as told:
        compare.collect([tmp_path / "a", empty, tmp_path / "b"])
    assert [message.split(":")[0] for message in told.value.messages] == [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(ConfigError, match=r"no summary\.json with figures; say python launch\.py evaluate"):
        compare.collect([empty])
    (empty / "config.yaml").write_text("data: {sauce: x}")
    with pytest.raises(ConfigError, match=r"config\.yaml: data\.source: missing"):
        compare.collect([empty])


def test_a_folder_of_something_else_is_not_written_over(tmp_path: Path) -> None:
    found = compare.collect([run_folder(tmp_path / "alpha", ALPHA)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds files of something else"):
        board.write(found, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").exists()
    board.write(found, tmp_path / "new")
    board.write(found, tmp_path / "new")
    assert list((tmp_path / "alpha").glob("events*"))


def test_a_pattern_that_takes_in_an_earlier_comparison_and_sweeps_is_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("alpha", "beta", "zeta"):
        run_folder(tmp_path / name, ALPHA)
    (tmp_path / "sweeps" / "tiny").mkdir(parents=True)
    (tmp_path / "sweeps" / "tiny" / "sweep.yaml").write_text("name: tiny\n")
    for _ in range(2):
        with pytest.raises(SystemExit) as left:
            launch.main(["compare", *map(str, sorted(tmp_path.iterdir()))])
        assert left.value.code == 0
        assert capsys.readouterr().err == f"{tmp_path / 'sweeps'} holds sweeps and no run; it is left out\n"
    assert {path.name for path in (tmp_path / "compare" / "tensorboard" / "training").iterdir()} == {
        "alpha",
        "beta",
        "zeta",
    }


def test_open_shows_the_report_in_the_browser(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or True)
    with pytest.raises(SystemExit):
        launch.main(["compare", str(done.folders[0]), "--open", "--out", str(done.out.parent / "another")])
    assert opened == [(done.out.parent / "another" / "report.html").as_uri()]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (18.2, 61, [20, 30, 40, 50, 60]),
        (-0.011, 0.012, [-0.01, -0.005, 0, 0.005, 0.01]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_a_long_curve_keeps_its_ends(tmp_path: Path) -> None:
    points = [svg.Point(step, 1 / step) for step in range(1, 100_001)]
    kept = svg.thinned(points)
    assert len(kept) <= svg.MOST_POINTS + 1
    assert (kept[0], kept[-1]) == (points[0], points[-1])


def test_chromium_shows_the_reports_figures(done: Done, chromium: Browser, tmp_path: Path) -> None:
    chromium.open((done.out / "report.html").as_uri())
    chromium.wait_for("document.readyState == 'complete' && every('#figures').length == 1")
    cells = chromium.evaluate(
        "every('#figures td[data-value]').map(e => ({...e.dataset, shown: e.innerText, "
        "bold: Number(getComputedStyle(e).fontWeight) >= 600}))"
    )
    expected = {"alpha": ALPHA, "beta": BETA[:3], "random": RANDOM, "supervised": BETA[3:]}
    read = {(cell["run"], cell["data"], cell["task"], cell["metric"], cell["labels"]): cell for cell in cells}
    assert len(read) == len(cells) == sum(map(len, expected.values()))
    for name, found in expected.items():
        for row in found:
            cell = read[name, row.data, row.task, row.metric, str(row.labels or "all")]
            assert float(cell["value"]) == row.value
            assert cell["shown"].split()[0] == (
                f"{row.value:.3f}" if row.metric == "rmse" else f"{100 * row.value:.1f}"
            )
            assert ("±" in cell["shown"]) == (len(row.values) > 1)
    assert [key[0] for key, cell in read.items() if cell["bold"]] == ["alpha", "beta", "beta"]
    check_charts(chromium)
    assert chromium.evaluate("every('img').map(e => [e.src.slice(0, 21), e.naturalWidth])") == [
        ["data:image/png;base64", 64],
        ["data:image/png;base64", 64],
    ]
    assert chromium.evaluate("performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))") == []
    chromium.screenshot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def check_charts(page: Browser) -> None:
    """Their points are the figures and the curves, and lie where the axes say."""
    charts = page.evaluate(
        "every('svg').map(e => ({title: e.getAttribute('aria-label'), "
        "points: every('.mark[data-series]', e).map(p => ({...p.dataset, top: p.getBoundingClientRect().top}))}))"
    )
    found = {
        chart["title"]: [(p["series"], p["x"], float(p["y"]), p["top"]) for p in chart["points"]] for chart in charts
    }
    assert list(found) == ["photos knn: accuracy against labels", *(f"{x} in training" for x in ("loss", "knn", "lr"))]
    labels = found["photos knn: accuracy against labels"]
    assert [point[:3] for point in labels] == [
        ("alpha", "10", 62.5),
        ("alpha", "all", 75),
        ("beta", "10", 50),
        ("beta", "all", 87.5),
        ("random", "10", 25),
        ("random", "all", 35),
        ("supervised", "10", 56.25),
    ]
    by_height = sorted(labels, key=lambda point: point[3])
    assert [point[2] for point in by_height] == sorted((point[2] for point in labels), reverse=True)
    assert [point[:3] for point in found["knn in training"]] == [
        *(("alpha", str(step), 12.5 * step) for step in (1, 3, 5)),
        *(("beta", str(step), 12.5 * step) for step in (1, 3, 5, 7)),
    ]
    assert len(found["loss in training"]) == 12


def test_chromium_shows_all_runs_in_one_tensorboard(done: Done, chromium: Browser, tmp_path: Path) -> None:
    command = shlex.split(next(line for line in done.said.splitlines() if line.startswith("TensorBoard:")))[1:]
    assert command[1:] == ["--logdir", str(done.out / "tensorboard")]
    with tensorboard(command, tmp_path) as url:
        chromium.open(f"{url}/#hparams")
        shown = "every('vaadin-grid-cell-content').map(e => e.innerText.trim()).filter(text => text)"
        chromium.wait_for(f"{shown}.includes('evaluation/beta')")
        cells = chromium.evaluate(shown)
        chromium.screenshot(tmp_path / "hparams.png")
        names = ["method.name", "train.lr", *(board.tag(column) for column in (KNN, KNN_ALL, DEPTH))]
        assert cells[: 2 + len(names)] == ["Trial ID", "Show Metrics", *names]
        assert table_row(cells, "evaluation/alpha") == ["simclr", 0.1, 0.625, 0.75, 0.5]
        assert table_row(cells, "evaluation/beta") == ["simclr", 0.2, 0.5, 0.875, 0.25]

        chromium.open(f"{url}/?tagFilter=^loss#timeseries")
        card = "(every('scalar-card')[0]?.innerText ?? '')"
        text = chromium.wait_for(f"/training.alpha[^]*training.beta/.test({card}) && {card}")
        assert re.search(r"training/beta\s+\S+\s+1\.1429\s+7\s", text), text  # smoothed, value, step

        chromium.open(f"{url}/?#projector")
        chromium.wait_for("every('.numDataPoints').some(e => e.innerText.trim() == '9')")
        chromium.wait_for("every('.dim').some(e => e.innerText.trim() == '6')")
        chromium.screenshot(tmp_path / "projector.png")
    of_alpha = done.out / "tensorboard" / "evaluation" / "alpha"
    assert next(of_alpha.rglob("metadata.tsv")).read_text().split("\n")[:3] == ["cat", "dog", "a bird"]


def table_row(cells: list[str], name: str) -> list[str | float]:
    """The settings and figures of a trial."""
    at = cells.index(name)
    return [cell if cell.isalpha() else float(cell) for cell in cells[at + 1 : at + 6]]


@contextmanager
def tensorboard(command: list[str], folder: Path) -> Iterator[str]:
    """Runs the command on a free port; its address once all runs are loaded."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with open(folder / "tensorboard.log", "w") as log:
        line = [*command, "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
        process = subprocess.Popen(line, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while not loaded(url):
            assert process.poll() is None, (folder / "tensorboard.log").read_text()
            assert time.monotonic() < until, f"no runs: {(folder / 'tensorboard.log').read_text()}"
            time.sleep(0.3)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def loaded(url: str) -> bool:
    """Without a proxy: urlopen keeps the one that an earlier test set, though only for itself."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/data/runs", timeout=10) as answer:
            found = answer.read().decode()
    except OSError:
        return False
    return all(name in found for name in ("training/beta", "evaluation/beta", "baselines/random"))


def test_a_line_of_blocks_follows_the_curve() -> None:
    assert terminal.bars([0, 7, 3.5]) == "▁█▅"[:2] + terminal.BARS[round(3.5)]
    assert terminal.bars([1.0, math.nan, 2.0]) == "▁?█"
    assert len(terminal.bars(list(range(1000)))) == terminal.NUM_BARS
