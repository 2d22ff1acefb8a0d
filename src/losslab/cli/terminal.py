"""What the commands share: options, the progress bar, the stop key, tables."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from losslab.probes.base import Probe, ProbeResult
from losslab.report import contents, page, seeds, table, talt_page
from losslab.report.talt_rows import is_watched
from losslab.status import StopRequested

console = Console()
errors = Console(stderr=True)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change a setting: a.b=c. May be repeated.")]
Tick = Callable[[float, float, str], None]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Tick | None]:
    """A bar with the time left on a terminal; nothing where output is piped, or in continuous integration."""
    if quiet or not console.is_terminal or "CI" in os.environ:  # some such services have a terminal
        yield None
        return
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with _Bar(BarColumn(), TaskProgressColumn(), *times, console=console) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda done, total, note: bar.update(task, completed=done, total=total or 1.0, description=note)


class _Bar(Progress):
    """A bar with the note on a line of its own, which 80 columns have no room for beside it."""

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar, and the note."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.description:
                yield Text(task.description, no_wrap=True, overflow="ellipsis")


class Stoppable:
    """A `Tick` that asks for the end once somebody has asked for it by a signal."""

    def __init__(self, bar: Tick | None) -> None:
        self.bar, self.done = bar, 0.0
        self.signal: signal.Signals | None = None

    def __call__(self, done: float, total: float, note: str) -> None:
        """Tell the bar.

        Raises:
            StopRequested: After a signal.
        """
        self.done = done
        if self.bar is not None:
            self.bar(done, total, note)
        if self.signal is not None:
            raise StopRequested


@contextmanager
def stop_key(bar: Tick | None, unit: str = "product") -> Iterator[Stoppable]:
    """The first Ctrl-C ends a computation with what is known by then; the second, or where that cannot be, at once.

    SIGTERM, by which a cluster takes a machine back, is the same as the first Ctrl-C.

    Args:
        bar: Told each tick.
        unit: What a computation does between two ticks, for the message.
    """
    tick = Stoppable(bar)

    def press(number: int, frame: object) -> None:
        if tick.signal is not None:
            raise KeyboardInterrupt
        tick.signal = signal.Signals(number)
        place = console if console.is_terminal else errors  # which writes above the bar that it shows
        place.print(f"stopping after this {unit}; Ctrl-C again to leave at once")

    before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield tick
    except StopRequested:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    if is_watched(folder):
        console.print(f"TALT's diagnostics: {talt_page.build(folder)}", soft_wrap=True)


def _summary(folder: Path) -> None:
    """The report's table on the terminal: a column a run, so that it fits; of many runs a row for all seeds of one."""
    found = contents.read(folder)
    if len(found.runs) > page.MANY:
        grid = seeds_table(seeds.HEAD)
        for row in seeds.rows(found.runs):
            grid.add_row(*map(escape, row))
        console.print(grid)
        return
    grid = Table("", *(escape(run.name) for run in found.runs))
    for column in table.COLUMNS:
        cells = [column.cell(run) for run in found.runs]
        if any(cell.text != table.ABSENT for cell in cells):
            grid.add_row(column.title, *map(cell_text, cells))
    for pair in found.pairs:
        grid.add_row(escape(f"barrier {pair.name}"), table.number(pair.get("interpolation.barrier")))
    console.print(grid)


def seeds_table(head: Sequence[str]) -> Table:
    """A row for all seeds of a run: long names are folded, so that no number is cut off."""
    return Table(Column(head[0], overflow="fold"), *(Column(title, no_wrap=True) for title in head[1:]))


def cell_text(cell: table.Cell) -> str:
    """A number, what belongs to it below, and a question mark on one that did not converge."""
    text = f"[yellow]{escape(cell.text)} ?[/yellow]" if cell.suspect else escape(cell.text)
    return f"{text}\n[dim]{escape(cell.note)}[/dim]" if cell.note else text


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
