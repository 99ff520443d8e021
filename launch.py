#!/usr/bin/env python3
"""The command line of distssl; without a command it is `pretrain`."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from distssl import atomic, config, report, settings
from distssl.errors import ConfigError, RunError
from distssl.on_ray import command_line
from distssl.on_ray import target as targets
from distssl.on_ray.command_line import Address, ClusterFile, Detach, DownWhenDone

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(command_line.app)
console = Console()
errors = Console(stderr=True)

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "default.yaml"
ConfigFile = Annotated[Path, typer.Option("--config", help="A YAML file; configs/ has one for each method.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example train.epochs=20.")]
OfEvaluation = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example eval.num_seeds=5.")
]
OfSweep = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example num_trials=20.")]
Workers = Annotated[int | None, typer.Option("--workers", min=0, help="Processes; 0: this one alone, without Ray.")]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="A run folder or its URL, for example runs/demo.")]
Storage = Annotated[str | None, typer.Option("--storage", help="Folder or URL of run folders: s3://bucket/runs.")]


@app.command()
def pretrain(
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    workers: Workers = None,
    storage: Storage = None,
    cluster: ClusterFile = None,
    address: Address = None,
    detach: Detach = False,
    down_when_done: DownWhenDone = False,
) -> None:
    """Pretrain a backbone on unlabelled images and show what it bought. Run again, it goes on where it was."""
    overrides = [*(overrides or []), *([f"machine.workers={workers}"] if workers is not None else [])]
    overrides += [f"machine.storage={storage}"] if storage else []
    if target := targets.of(cluster, address, detach, down_when_done):
        command_line.pretrain(config_file, overrides, target)
    from distssl import method
    from distssl.on_ray import here

    raise typer.Exit(here.pretrain(config.load(config_file, overrides, method.options), console, errors))


@app.command()
def evaluate(
    run: RunFolder,
    task: Annotated[str, typer.Option("--task", help=f"{', '.join(config.TASKS)}; all: what labels allow.")] = "all",
    overrides: OfEvaluation = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers; by default none here, on a cluster all it has room for.")
    ] = None,
    cluster: ClusterFile = None,
    address: Address = None,
    detach: Detach = False,
    down_when_done: DownWhenDone = False,
) -> None:
    """Evaluate a run's newest checkpoint, the same backbone untrained, and one trained on the labels alone."""
    tasks = None if task == "all" else task.split(",")
    for name in tasks or ():
        if name not in config.TASKS:
            raise ConfigError(f"--task {name}: {', '.join(config.TASKS)} or all is right")
    if target := targets.of(cluster, address, detach, down_when_done):
        command = ["evaluate", run, "--task", task, *(["--workers", str(workers)] if workers else [])]
        command += overrides or []
        command_line.other(f"evaluate-{Path(run).name}", command, (workers or 1, f"--workers {workers}"), target)
    from distssl import run_folder
    from distssl.on_ray import here

    here.evaluate(run_folder.find(run, overrides or []), tasks, workers, console)


@app.command()
def sweep(
    config_file: Annotated[Path, typer.Option("--config", help="A YAML file as those in configs/sweep.")],
    overrides: OfSweep = None,
    storage: Annotated[str | None, typer.Option(help="Folder or URL that sweeps lie in: s3://bucket/sweeps.")] = None,
    cluster: ClusterFile = None,
    address: Address = None,
    detach: Detach = False,
    down_when_done: DownWhenDone = False,
) -> None:
    """Search hyperparameters, labels and backbones of a downstream task. Run again after a stop, it goes on."""
    overrides = [*(overrides or []), *([f"storage={storage}"] if storage else [])]
    if target := targets.of(cluster, address, detach, down_when_done):
        command_line.sweep(config_file, overrides, target)
    from distssl import sweep as sweeps
    from distssl.on_ray import here
    from distssl.on_ray import sweep as on_ray

    swept = sweeps.load(config_file, overrides)
    console.print(f"sweep {swept.name}: {swept.num_trials} trials of {swept.task}, {swept.parallel} at a time")
    outcomes = on_ray.run(swept, report.SweepProgress(swept, console))
    if outcomes is None:
        errors.print("stopped; the same command goes on with what is left of the trials")
        raise typer.Exit(here.STOPPED)
    report.show_sweep(swept, outcomes, console)


@app.command()
def plan(
    overrides: Overrides = None,
    config_file: ConfigFile = DEFAULT_CONFIG,
    cluster: Annotated[Path | None, typer.Option(help="A file as those in cluster/: its machines and prices.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="What --save wrote; else a few steps are taken here.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Keep what was measured, for --calibration.")] = None,
) -> None:
    """Say what a run would take (steps, hours, cost) and what limits it, from a few measured steps."""
    from distssl import forecast, method

    run = config.load(config_file, overrides or [], method.options)
    tree = settings.read_extending(cluster, "--cluster") if cluster else None
    forecast.show(forecast.make(run, tree, calibration, save), console)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders or URLs, for example runs/*.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default `compare` beside the first.")] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
) -> None:
    """Compare runs: a table here, report.html, and one TensorBoard with all of them."""
    import webbrowser

    from distssl import board, page, run_folder, terminal
    from distssl import compare as comparing
    from distssl import sweep as sweeps

    out = (out or run_folder.beside(runs[0]) / "compare").resolve()
    for run in (holding := [run for run in runs if sweeps.lie_in(Path(run))]):
        errors.print(f"{run} holds sweeps and no run; it is left out", soft_wrap=True, markup=False, highlight=False)
    others = [run for run in runs if run not in holding and Path(run).resolve() != out] or runs  # runs/* has both
    comparison = comparing.collect(run_folder.with_records(others))
    atomic.make_folder(out)
    with atomic.locked(out):
        page.write(comparison, out / "report.html", shlex.join(["python", "launch.py", *sys.argv[1:]]))
        board.write(comparison, out / "tensorboard")
    terminal.show(comparison, console)
    console.print(f"report:      {out / 'report.html'}", soft_wrap=True, markup=False)
    tensorboard = [Path(sys.executable).parent / "tensorboard", "--logdir", out / "tensorboard"]
    console.print(f"TensorBoard: {shlex.join(map(str, tensorboard))}", soft_wrap=True, markup=False)
    if show and not webbrowser.open((out / "report.html").as_uri()):
        errors.print("no browser was found; open the report by hand")


@app.command()
def export(
    run: RunFolder,
    form: Annotated[str, typer.Option("--format", help="torchvision, timm, safetensors or onnx.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; RUN/export by default.")] = None,
    licence: Annotated[str | None, typer.Option(help="For the model card.")] = None,
) -> None:
    """Write a run's backbone for other programs, after proving on images that it gives the same features."""
    from distssl import export as exporting
    from distssl import run_folder

    found = run_folder.with_checkpoint(run)
    done = exporting.export(found.run, found.folder, form, out, licence)
    run_folder.give_back(found, done.file.parent)
    how_far = f"largest error {done.error:.1e}, {done.relative_error:.1e} of the largest feature"
    console.print(f"{done.file}: {how_far}", soft_wrap=True, markup=False)


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="Folder, zip, CSV or torchvision dataset name.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards and their index.")],
) -> None:
    """Pack images into WebDataset tars with an index. Run again after a stop, it goes on."""
    from distssl import progress
    from distssl.data import shards

    with progress.bar("packing", console) as advance:
        _describe(shards.pack(source, out, progress=advance))


@app.command()
def index(
    url: Annotated[str, typer.Argument(help="Folder of tars, a tar, a glob or a brace pattern; s3:// and the like.")],
    out: Annotated[str | None, typer.Option(help="Place for the index; beside the tars by default.")] = None,
    verify: Annotated[
        bool | None, typer.Option(help="Decode every image; by default as in the index that is there, else not.")
    ] = None,
) -> None:
    """Index WebDataset tars where they lie. Run again after a stop, it goes on."""
    from distssl import progress
    from distssl.data import shards

    with progress.bar("indexing", console) as advance:
        _describe(shards.index(url, out, verify=verify, progress=advance))


@app.command()
def verify(
    methods: Annotated[str, typer.Option("--methods", help="Comma-separated; all by default.")] = "",
    world_sizes: Annotated[str, typer.Option("--world-sizes", help="Numbers of workers, comma-separated.")] = "1,2,4",
    cluster: ClusterFile = None,
    address: Address = None,
    detach: Detach = False,
    down_when_done: DownWhenDone = False,
) -> None:
    """Certify that views, losses, gradients and parameters are the same at any number of workers."""
    import tempfile

    from distssl import method

    sizes = _whole_numbers("--world-sizes", world_sizes)
    names = [method.find(name).__module__.rpartition(".")[2] for name in methods.split(",") if name] or method.names()
    if target := targets.of(cluster, address, detach, down_when_done):
        command = ["verify", "--methods", methods, "--world-sizes", world_sizes]
        command_line.other("verify", command, (max(sizes), f"--world-sizes {max(sizes)}"), target)
    from distssl import verify as certificate
    from distssl.on_ray import place

    elsewhere = None
    if place.on_cluster():
        from distssl.on_ray import verify as on_ray

        elsewhere = on_ray.at(sizes)
    cases = [certificate.Case(name, accumulate) for name in names for accumulate in (1, 2)]
    with tempfile.TemporaryDirectory(prefix="distssl-verify-") as folder:
        verdicts = list(certificate.certify(cases, sizes, Path(folder), elsewhere))
    report.show_verdicts(verdicts, console)
    if not all(verdict.holds for verdict in verdicts):
        raise RunError("a method does not take the same steps at every number of workers")


def _whole_numbers(key: str, text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise ConfigError(f"{key} {text}: whole numbers of at least 1 are right, for example 1,2,4")
    return [int(part) for part in text.split(",")]


def _describe(folder: Path | str) -> None:
    from distssl.data.shards import Dataset

    found = Dataset.open(folder)
    labels = f"{found.num_labelled} with one of {len(found.classes)} labels"
    console.print(f"{folder}: {found.num_samples} images in {len(found.shard_paths)} shards, {labels}")


def main(arguments: list[str]) -> int:
    """Run one command; the exit code: 0 done, 1 the run failed, 2 the input is wrong, 130 stopped."""
    registered = (*app.registered_commands, *command_line.app.registered_commands)
    commands = {command.callback.__name__ for command in registered if command.callback}
    if not arguments or arguments[0] not in commands | {"--help"}:
        arguments = ["pretrain", *arguments]
    if errors.is_terminal:
        handler = RichHandler(console=errors, show_time=False, show_path=False, markup=False)
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    else:  # a line of the log is one of the file
        logging.basicConfig(level=logging.INFO, format="%(levelname)-8s %(message)s")
    try:
        app(arguments)  # leaves by SystemExit, with 2 for wrong usage
    except ConfigError as error:
        for message in error.messages:
            _complain(message)
        return 2
    except RunError as error:
        _complain(str(error))
        return 1
    return 0


def _complain(message: str) -> None:
    errors.print(f"error: {message}", style="red", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
