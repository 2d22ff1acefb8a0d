"""`losslab compare`: which optimizer is better, and how sure that is."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from losslab.cli.terminal import Quiet, cell_text, console, progress_bar, stop_key
from losslab.report import comparison_page, comparison_table
from losslab.report.comparison import read
from losslab.status import Status
from losslab.studies.compare.plan import load_plan
from losslab.studies.compare.protocol import compare as run_comparison
from losslab.studies.engine.jobs import EngineOptions
from losslab.studies.shipped import find_config


def compare(
    config: Annotated[
        str, typer.Argument(help="A YAML or JSON file (base, optimizers, seeds, target), or a shipped name.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Study folder; default runs/<file>.")] = None,
    parallel: Annotated[int, typer.Option("--parallel", help="Runs at a time; 2 is best on two cores.")] = 1,
    engine: Annotated[str, typer.Option("--engine", help="local or ray, of the runs after tuning.")] = "local",
    address: Annotated[str | None, typer.Option("--address", help="The Ray cluster's.")] = None,
    quiet: Quiet = False,
) -> None:
    """Compare optimizers honestly: tuned alike, fresh seeds, a verdict with its uncertainty.

    What is there already is kept, so that a second start goes on. The first Ctrl-C ends with what is known.
    """
    path = find_config(config, "compare")
    plan, folder = load_plan(path), output or Path("runs") / path.stem
    options = EngineOptions(parallel=parallel, engine=engine, address=address)  # type: ignore[arg-type]  # it checks
    with progress_bar(quiet) as bar, stop_key(bar, "step") as tick:
        found = run_comparison(plan, folder, options, progress=tick)
    finish(folder)
    if found.status is Status.stopped:
        console.print(f"stopped: the same command with --output {folder} goes on", soft_wrap=True)
        raise typer.Exit(128 + tick.signal if tick.signal is not None else 1)  # as shells write a signal's end


def finish(folder: Path) -> None:
    """Make a comparison's report; print its table, its verdict and where the report is."""
    path, comparison = comparison_page.build(folder), read(folder).comparison
    names = (each.name + " (baseline)" * (each.name == comparison.baseline) for each in comparison.contenders)
    grid = Table("", *map(escape, names))
    for line in comparison_table.LINES:
        cells = [line.cell(comparison, each) for each in comparison.contenders]
        if any(cell.text != comparison_table.ABSENT for cell in cells):
            grid.add_row(line.title, *map(cell_text, cells))
    console.print(grid)
    for remark in comparison_table.remarks(comparison):
        console.print(remark, style="yellow", highlight=False, markup=False)
    for sentence in comparison.verdicts:
        console.print(sentence, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {path}", soft_wrap=True)
