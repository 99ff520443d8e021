"""The command line's part about clusters. Imports no Ray, which takes seconds and looks for its token when imported."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from distssl.errors import ConfigError
from distssl.on_ray import target as targets
from distssl.on_ray import token
from distssl.on_ray.target import Target

ClusterFile = Annotated[
    Path | None, typer.Option("--cluster", help="Run it there: a cluster file, as those in cluster/.")
]
Address = Annotated[str | None, typer.Option(help="Or the dashboard's URL of a cluster that somebody else runs.")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not follow the job on the cluster.")]
DownWhenDone = Annotated[bool, typer.Option("--down-when-done", help="End the cluster with the job.")]
Job = Annotated[
    str | None, typer.Argument(metavar="[JOB]", help="A job, or the name of its run; the newest by default.")
]

app = typer.Typer()
console = Console()


@app.command()
def attach(job: Job = None, cluster: ClusterFile = None, address: Address = None) -> None:
    """Follow a job on a cluster again."""
    _speak("attach", job, cluster=cluster, address=address)


@app.command()
def status(cluster: ClusterFile = None, address: Address = None) -> None:
    """Show a cluster's hosts, what they cost, and its jobs."""
    _speak("status", cluster=cluster, address=address)


@app.command()
def logs(job: Job = None, cluster: ClusterFile = None, address: Address = None) -> None:
    """Print what a job has said so far."""
    _speak("logs", job, cluster=cluster, address=address)


@app.command()
def stop(job: Job = None, cluster: ClusterFile = None, address: Address = None) -> None:
    """Have a pretraining save a checkpoint and stop; other jobs end at once. The cluster stays."""
    _speak("stop", job, cluster=cluster, address=address)


@app.command()
def down(cluster: ClusterFile = None) -> None:
    """End every host of a cluster."""
    _speak("down", cluster=cluster, address=None)


def pretrain(config_file: Path, overrides: list[str], target: Target) -> NoReturn:
    """The main job on a cluster."""
    raise typer.Exit(_commands().pretrain(config_file, overrides, target, console))


def sweep(config_file: Path, overrides: list[str], target: Target) -> NoReturn:
    """A sweep on a cluster."""
    raise typer.Exit(_commands().sweep(config_file, overrides, target, console))


def other(name: str, command: list[str], demand: tuple[int, str], target: Target) -> NoReturn:
    """Another command of launch.py on a cluster. demand: workers, and what asks for them."""
    raise typer.Exit(_commands().other(name, command, demand, target, console))


def _speak(command: str, *job: str | None, cluster: Path | None, address: str | None) -> NoReturn:
    target = targets.of(cluster, address)
    if target is None:
        raise ConfigError(f"{command}: say which cluster, for example --cluster cluster/aws.yaml")
    raise typer.Exit(getattr(_commands(), command)(*job, target, console))


def _commands() -> ModuleType:
    token.prepare()
    from distssl.on_ray import commands

    return commands
