"""`losslab batch`: many runs from one file."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperCommand

from losslab.cli.terminal import Quiet, console, errors, seeds_table, stop_key
from losslab.report import seeds
from losslab.report.table import ABSENT
from losslab.studies import batch as batches
from losslab.studies.batch_file import read_batch, together
from losslab.studies.engine.following import RunRow
from losslab.studies.engine.jobs import EngineOptions, Outcome
from losslab.studies.engine.resources import available_cpus
from losslab.studies.shipped import find_config

FAILED, INTERRUPTED = 1, 130  # exit codes
GIB = 1 << 30
ALL = 0  # --parallel without a number
COLORS = {"finished": "green", "skipped": "green", "running": "cyan", "failed": "red", "stopped": "yellow"}
ENDS, KEYS = ("run", "how", "test accuracy", "test loss", "seconds"), ("test_accuracy", "test_loss")
TOP = ("running", "failed")  # states that are shown first
MARGIN = 6  # lines of a terminal that are not rows


class BatchCommand(TyperCommand):
    """Takes `--parallel` without a number too, as the founding study's command does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare `--parallel` its number."""
        given: list[str] = []
        for argument, following in zip(args, [*args[1:], "-"], strict=True):
            given += [argument, str(ALL)] if argument == "--parallel" and following.startswith("-") else [argument]
        return super().parse_args(ctx, given)


def batch(
    config: Annotated[str, typer.Option("--config", help="The batch file, JSON or YAML, or a shipped one's name.")],
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "--output", "-o", help="Study folder; default runs/<file's name>.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=0, help="Runs at a time; without a number, as many as there are CPUs.")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="This machine's processes, or a Ray cluster.")
    ] = "local",
    address: Annotated[str | None, typer.Option(help="The Ray cluster's, such as auto.")] = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Train the sound entries of a broken file.")
    ] = False,
    retries: Annotated[int, typer.Option(min=0, help="How often a run whose process was killed is started again.")] = 2,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs of each run.")] = None,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each run.")] = 0,
    memory: Annotated[float | None, typer.Option(help="GiB that each run needs; measured if not given.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train all runs of a file, each in a process of its own. Started again: what is not finished."""
    if parallel == ALL:
        parallel = len(available_cpus()) if engine == "local" else None
    options = EngineOptions(
        parallel=parallel,
        engine=engine,
        address=address,
        retries=retries,
        cpus=cpus,
        gpus=gpus,
        memory=None if memory is None else int(memory * GIB),
    )
    path = find_config(config, "batch")
    folder, wanted = output_dir or Path("runs") / path.stem, read_batch(path)
    with live_table(quiet) as table, stop_key(None, "step") as tick:
        outcomes = batches.run_batch(
            wanted, folder, options, skip_invalid=skip_invalid, progress=tick, table=table.show
        )
    console.print(_ends(outcomes))
    for outcome in outcomes:
        if outcome.error is not None:
            errors.print(f"{outcome.name}: {outcome.error}", style="red", highlight=False, markup=False, soft_wrap=True)
    counts = Counter(outcome.status for outcome in outcomes)
    states = ", ".join(f"{count} {status}" for status, count in counts.items())
    console.print(f"{folder / batches.SUMMARY}: {states}", soft_wrap=True, highlight=False)
    if counts["stopped"]:
        raise typer.Exit(INTERRUPTED)
    if counts["failed"]:
        raise typer.Exit(FAILED)


class LiveTable:
    """All runs, redrawn as they go; silent where nobody looks."""

    def __init__(self, live: Live | None) -> None:
        self._live = live

    def show(self, rows: Sequence[RunRow]) -> None:
        """Take a row for each run."""
        if self._live is not None:
            self._live.update(progress_table(rows, console.height - MARGIN), refresh=True)


@contextmanager
def live_table(quiet: bool) -> Iterator[LiveTable]:
    """A table of all runs on a terminal; nothing where output is piped, or in continuous integration."""
    if quiet or not console.is_terminal or "CI" in os.environ:
        yield LiveTable(None)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield LiveTable(live)


def progress_table(rows: Sequence[RunRow], room: int) -> Table:
    """The runs at work and those that failed first, as many as the terminal has room for."""
    order = sorted(rows, key=lambda row: TOP.index(row.state) if row.state in TOP else len(TOP))
    grid = Table(Column("run", no_wrap=True), "state", "done", "epoch", "train loss", "validation", "rate")
    for row in order[:room]:
        values = row.values
        state = f"{row.state} #{row.attempts}" if row.attempts > 1 else row.state
        grid.add_row(
            escape(row.name),
            f"[{COLORS.get(row.state, 'dim')}]{state}[/]",
            f"{row.done:.0%}",
            _number(values.get("epoch"), "g"),
            _number(values.get("train_loss"), ".4g"),
            _number(values.get("validation_accuracy"), ".1%"),
            _number(values.get("learning_rate"), ".3g"),
        )
    if len(rows) > room:
        grid.caption = f"and {len(rows) - room} more"
    return grid


def _ends(outcomes: Sequence[Outcome]) -> Table:
    """How each run ended; of an entry with `seeds` all together: mean ± standard deviation, the median of seconds."""
    grid = seeds_table(ENDS)
    for name, group in together(outcomes).items():
        finals = [final for outcome in group if (final := batches.final_row(outcome))]
        accuracies, losses = ([final[key] for final in finals if key in final] for key in KEYS)
        seconds = f"{median(outcome.seconds for outcome in group):.1f}"
        grid.add_row(escape(name), _how(group), seeds.mean_accuracy(accuracies), seeds.mean(losses), seconds)
    return grid


def _how(group: Sequence[Outcome]) -> str:
    """Each way to end, with the number of runs where there are several; how often the worst of them was started."""
    counts: Counter[tuple[str, str]] = Counter()
    for outcome in group:
        diverged = batches.final_row(outcome).get("status") == "diverged"
        counts["diverged" if diverged else outcome.status, COLORS[outcome.status]] += 1
    several, attempts = len(group) > 1, max(outcome.attempts for outcome in group)
    lines = [f"[{color}]{f'{count} ' * several}{how}[/]" for (how, color), count in counts.items()]
    return "\n".join([*lines, *([f"{attempts} attempts"] * (attempts > 1))])


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)
