"""What the commands share: options, the progress bar, the stop key, tables."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from losslab.probes.base import Probe, ProbeResult
from losslab.report import contents, page, table
from losslab.status import StopRequested

console = Console()
errors = Console(stderr=True)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a setting: a.b=c. May be repeated.")]
Tick = Callable[[float, float, str], None]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Tick | None]:
    """A bar with the time left on a terminal; nothing where output is piped."""
    if quiet or not console.is_terminal:
        yield None
        return
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(BarColumn(), TaskProgressColumn(), *times, TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda done, total, note: bar.update(task, completed=done, total=total or 1.0, description=escape(note))


@contextmanager
def stop_key(bar: Tick | None) -> Iterator[Tick]:
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


def show(row: Probe, result: ProbeResult) -> None:
    """The result's own summary if it has one, and all its scalars."""
    if type(result).__str__ is not object.__str__:
        console.print(str(result), highlight=False)
    values, _ = result.to_record()
    grid = Table("value", row.name, title=row.question, title_justify="left")
    for key, value in _flat(values):
        grid.add_row(key, f"{value:.6g}" if isinstance(value, float) else str(value))
    console.print(grid)
    if not result.status.ok:
        console.print(f"[yellow]{result.status}[/yellow]: {result.status.message}")


def finish(folder: Path) -> None:
    """Make a folder's report, and print its table and where it is."""
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


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
