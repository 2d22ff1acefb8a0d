"""The program: its options, its remaining commands, and what becomes of errors."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from losslab._version import __version__
from losslab.cli import batching, boarding, comparing, measuring, running, showing, training, tuning
from losslab.cli.terminal import console, errors, finish
from losslab.memory import keep_freed_memory
from losslab.probes import PROBES
from losslab.report.comparison import is_comparison
from losslab.report.tuning import is_tuning
from losslab.studies.batch_file import read_batch
from losslab.studies.data import DATASETS
from losslab.studies.models import MODELS
from losslab.studies.optimizer_rows import ROWS
from losslab.studies.shipped import purpose, shipped_configs

INTERRUPTED = 130  # what a shell expects after Ctrl-C


def print_version(on: bool) -> None:
    """Print the version and leave."""
    if on:
        console.print(f"losslab {__version__}")
        raise typer.Exit


def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Measure the geometry of a neural network's loss."""
    # The program's own process: nothing else shares it, so its memory may stay (see memory.keep_freed_memory).
    keep_freed_memory()


def report(folder: Annotated[Path, typer.Argument(help="A run folder, or a study folder that holds several.")]) -> None:
    """Make the page and the pictures of a run or a study, from its files alone."""
    if is_tuning(folder):
        tuning.show_tuned(folder)
    elif is_comparison(folder):
        comparing.finish(folder)
    else:
        finish(folder)


def list_names() -> None:
    """Name the probes, models, data sets, optimizers and shipped configurations."""
    grid = Table("kind", "name", "what")
    for row in PROBES.values():
        grid.add_row("probe", row.name, row.question)
    for kind, names in (("model", MODELS), ("data set", DATASETS)):
        for name, function in names.items():
            grid.add_row(kind, name, (function.__doc__ or "").strip().splitlines()[0])
    for name, settings in ROWS.items():
        grid.add_row("optimizer", name, ", ".join(f"{key} {value}" for key, value in settings.items()))
    for kind, folder in (("configuration", ""), ("comparison", "compare")):
        for name, path in shipped_configs(folder).items():
            grid.add_row(kind, name, purpose(path))
    for name, path in shipped_configs("batch").items():
        grid.add_row("batch", name, read_batch(path).description)
    console.print(grid)


app = typer.Typer(
    help="Measure the geometry of a neural network's loss.", no_args_is_help=True, pretty_exceptions_enable=False
)
study = typer.Typer(help="Whole studies in one command.", no_args_is_help=True)
show = typer.Typer(help="Pictures of a network at work.", no_args_is_help=True)
app.callback()(options)
demo = typer.Typer(help="Three optimizers on real digits, probed; or another demonstration by its name.")
app.add_typer(demo, name="demo")
demo.callback(invoke_without_command=True)(training.demo)
demo.command()(training.homotopy)
app.command(context_settings=measuring.TAKES_SETTINGS)(running.train)
app.command(cls=batching.BatchCommand)(batching.batch)
app.command()(tuning.tune)
app.command()(comparing.compare)
app.command(context_settings=measuring.TAKES_SETTINGS)(measuring.probe)
app.command()(measuring.analyze)
app.add_typer(study, name="study")
study.command()(training.fourway)
app.add_typer(show, name="show")
show.command()(showing.features)
show.command()(showing.attention)
app.command()(report)
app.command()(boarding.board)
app.command("list")(list_names)


def main() -> None:
    """The entry point: an error of the user's is one line and exit code 2; `--debug` shows where it came from."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if "--debug" in sys.argv:
            raise
        errors.print(f"losslab: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
