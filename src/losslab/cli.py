"""The command line: parses, calls, prints. Nothing is computed here."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from losslab._version import __version__
from losslab.memory import keep_freed_memory
from losslab.probes import PROBES
from losslab.ranks import Ranks
from losslab.report import contents, page, table
from losslab.status import StopRequested
from losslab.studies.config import load_config
from losslab.studies.config_file import assign
from losslab.studies.data import DATASETS
from losslab.studies.demo import QUICK, DemoSettings
from losslab.studies.demo import demo as run_demo
from losslab.studies.models import MODELS
from losslab.studies.probing import find_probe, measure, plan_of, risk_of
from losslab.studies.record import RunFolder
from losslab.studies.shipped import find_config, shipped_configs
from losslab.studies.train import load_run
from losslab.studies.train import train as run_training

INTERRUPTED = 130  # what a shell expects after Ctrl-C

app = typer.Typer(
    help="Measure the geometry of a neural network's loss.", no_args_is_help=True, pretty_exceptions_enable=False
)
console = Console()
errors = Console(stderr=True)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a setting: a.b=c. May be repeated.")]
Tick = Callable[[float, float, str], None]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


def print_version(on: bool) -> None:
    """Print the version and leave."""
    if on:
        console.print(f"losslab {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Measure the geometry of a neural network's loss."""
    # The program's own process: nothing else shares it, so its memory may stay (see memory.keep_freed_memory).
    keep_freed_memory()


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller settings: half a minute.")] = False,
    output: Output = Path("runs/demo"),
    quiet: Quiet = False,
) -> None:
    """Train three optimizers on real digits, probe their solutions, and write a report."""
    with _progress(quiet) as tick:
        try:
            run_demo(output, QUICK if quick else DemoSettings(), progress=tick)
        except KeyboardInterrupt:
            console.print("stopped: the report shows what was measured by then")
            if output.is_dir() and any(RunFolder(child).is_run() for child in output.iterdir()):
                _finish(output)
            raise
    _finish(output)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML or JSON file, or the name of a shipped configuration.")],
    changes: Changes = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder; default runs/<name>.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in that folder.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train one configuration into a run folder."""
    settings = load_config(find_config(config), changes or ())
    path = output or Path("runs") / settings.name
    folder = RunFolder.create(path, overwrite=overwrite and RunFolder(path).is_run())
    with _progress(quiet) as tick:
        run_training(settings, folder, progress=tick)
    final = folder.metrics()[-1]
    console.print(f"{folder.path}: test accuracy {final['test_accuracy']:.1%}, test loss {final['test_loss']:.4g}")


@app.command()
def probe(
    name: Annotated[str, typer.Argument(help="Which probe; see `losslab list`.")],
    # torchrun takes --run for an abbreviation of an option of its own, wherever it stands.
    run: Annotated[Path, typer.Option("--run", "--from", help="Run folder of the solution; --from under torchrun.")],
    to: Annotated[Path | None, typer.Option("--to", help="Run folder of the second solution.")] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="last or best")] = "last",
    settings: Changes = None,
    max_examples: Annotated[int | None, typer.Option("--max-examples", help="A fixed random part of the data.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost (spectrum).")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure one thing at a run's solution and keep it in the run folder. Under torchrun, with all its processes."""
    row = find_probe(name)
    chosen: dict[str, Any] = {}
    for change in settings or ():
        assign(chosen, change)
    solution = load_run(run, checkpoint)
    other = load_run(to, checkpoint) if to is not None else None
    with Ranks.joined() as ranks, _progress(quiet or ranks.rank > 0) as bar, _stop_key(bar) as tick:
        risk = risk_of(solution, ranks=ranks, max_examples=max_examples)
        if dry_run:
            text = str(plan_of(row, risk, chosen))
            if ranks.rank == 0:
                console.print(text, highlight=False)
            return
        result = measure(row, solution, other, settings=chosen, risk=risk, progress=tick)
        if ranks.rank > 0:
            return
    if type(result).__str__ is not object.__str__:  # it has a summary of its own
        console.print(str(result), highlight=False)
    values, _ = result.to_record()
    grid = Table("value", name, title=row.question, title_justify="left")
    for key, value in _flat(values):
        grid.add_row(key, f"{value:.6g}" if isinstance(value, float) else str(value))
    console.print(grid)
    if not result.status.ok:
        console.print(f"[yellow]{result.status}[/yellow]: {result.status.message}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder, or a study folder that holds several.")]) -> None:
    """Make the page and the pictures of a run or a study, from its files alone."""
    _finish(folder)


@app.command("list")
def list_names() -> None:
    """Name the probes, models, data sets and shipped configurations."""
    grid = Table("kind", "name", "what")
    for row in PROBES.values():
        grid.add_row("probe", row.name, row.question)
    for kind, names in (("model", MODELS), ("data set", DATASETS)):
        for name, function in names.items():
            grid.add_row(kind, name, (function.__doc__ or "").strip().splitlines()[0])
    for name, path in shipped_configs().items():
        grid.add_row("configuration", name, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "))
    console.print(grid)


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


def _finish(folder: Path) -> None:
    path = page.build(folder)
    _summary(folder)
    console.print(f"report: {path}", soft_wrap=True)


def _summary(folder: Path) -> None:
    """The report's table on the terminal: a column a run, so that it fits."""
    found = contents.read(folder)
    grid = Table("", *(escape(run.name) for run in found.runs))
    for column in table.COLUMNS:
        cells = [column.cell(run) for run in found.runs]
        if any(cell.text != table.ABSENT for cell in cells):
            grid.add_row(column.title, *map(_cell, cells))
    for pair in found.pairs:
        grid.add_row(escape(f"barrier {pair.name}"), table.number(pair.get("interpolation.barrier")))
    console.print(grid)


def _cell(cell: table.Cell) -> str:
    """A number, what belongs to it below, and a question mark on one that did not converge."""
    text = f"[yellow]{escape(cell.text)} ?[/yellow]" if cell.suspect else escape(cell.text)
    return f"{text}\n[dim]{escape(cell.note)}[/dim]" if cell.note else text


@contextmanager
def _progress(quiet: bool) -> Iterator[Tick | None]:
    """A bar with the time left on a terminal; nothing where output is piped."""
    if quiet or not console.is_terminal:
        yield None
        return
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(BarColumn(), TaskProgressColumn(), *times, TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda done, total, note: bar.update(task, completed=done, total=total or 1.0, description=escape(note))


@contextmanager
def _stop_key(bar: Tick | None) -> Iterator[Tick]:
    """The first Ctrl-C ends a measurement with what is known by then; the second, or where that cannot be, at once."""
    pressed = False

    def press(number: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        errors.print("stopping after this product; Ctrl-C again to leave at once")

    def tick(done: float, total: float, note: str) -> None:
        if bar is not None:
            bar(done, total, note)
        if pressed:
            raise StopRequested

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, press)
    try:
        yield tick
    except StopRequested:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

