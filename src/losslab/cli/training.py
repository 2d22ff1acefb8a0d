"""`losslab demo`, `losslab demo homotopy` and `losslab study`: what trains several."""

import math
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from losslab.cli.terminal import Changes, Output, Quiet, console, finish, progress_bar
from losslab.report import matplotlib_backend
from losslab.report.charts.homotopy_demo import charts as homotopy_charts
from losslab.report.lines import line_pictures
from losslab.studies.config import from_assignments, load_config
from losslab.studies.demo import QUICK, DemoSettings
from losslab.studies.demo import demo as run_demo
from losslab.studies.fourway import fourway as run_fourway
from losslab.studies.homotopy_demo import QUICK as QUICK_HOMOTOPY
from losslab.studies.homotopy_demo import HomotopyDemo, Outcome, homotopy_demo
from losslab.studies.record import RunFolder
from losslab.studies.shipped import find_config


def demo(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller settings: half a minute.")] = False,
    output: Output = Path("runs/demo"),
    quiet: Quiet = False,
) -> None:
    """Train three optimizers on real digits, probe their solutions, and write a report."""
    if context.invoked_subcommand is not None:
        return
    with progress_bar(quiet) as tick:
        try:
            run_demo(output, QUICK if quick else DemoSettings(), progress=tick)
        except KeyboardInterrupt:
            console.print("stopped: the report shows what was measured by then")
            if output.is_dir() and any(RunFolder(child).is_run() for child in output.iterdir()):
                finish(output)
            raise
    finish(output)


def homotopy(
    quick: Annotated[bool, typer.Option("--quick", help="Few steps, two rates: to see it run.")] = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="MNIST's data: dataset.download=true, or dataset.name=arrays:FILE.npz."),
    ] = None,
    output: Output = Path("runs/demo-homotopy"),
    quiet: Quiet = False,
) -> None:
    """Run the founding document's experiments with the homotopy rate: a quadratic, a small network, MNIST."""
    settings = QUICK_HOMOTOPY if quick else HomotopyDemo()
    wanted = [f"dataset.{key}={value}" for key, value in settings.data.model_dump(exclude_defaults=True).items()]
    data = from_assignments([*wanted, *(changes or ())]).dataset
    with progress_bar(quiet) as tick:
        outcomes, left_out = homotopy_demo(output, replace(settings, data=data), progress=tick)
    for experiment, rows in groupby(outcomes, key=lambda row: row.experiment):
        console.print(_homotopy_table(experiment, list(rows)))
    for sentence in left_out:
        console.print(sentence, style="yellow", highlight=False, markup=False, soft_wrap=True)
    images = matplotlib_backend.save_all(homotopy_charts(output, {row.experiment for row in outcomes}), output)
    console.print(f"step by step: {output}/*.csv; pictures: {images}", soft_wrap=True, highlight=False)


def _homotopy_table(experiment: str, outcomes: list[Outcome]) -> Table:
    """What was measured, beside what the founders said."""
    with_steps, with_claims = (any(map(has, outcomes)) for has in (lambda row: row.steps >= 0, lambda row: row.claim))
    grid = Table("rate", "η₀", "loss", "steps" if with_steps else "accuracy", "seconds", title=experiment)
    if with_claims:
        grid.add_column("founders' claim")
    for row in outcomes:
        steps = f"{row.steps:g}" if math.isfinite(row.steps) else "never"
        found = [f"{row.loss:.4g}", steps if with_steps else f"{row.accuracy:.1%}", f"{row.seconds:.2f}"]
        claim = [row.claim] if with_claims else []
        grid.add_row(row.method, f"{row.base_lr:.3g}{', tuned' * row.tuned}", *found, *claim)
    return grid


def fourway(
    configs: Annotated[
        list[str] | None, typer.Argument(help="Configurations; default sgd, sgd_momentum and adamw.")
    ] = None,
    output: Output = Path("runs/fourway"),
    seed: Annotated[int, typer.Option("--seed", help="Of the trainings and the probes.")] = 42,
    changes: Changes = None,
    quiet: Quiet = False,
) -> None:
    """Train several optimizers, run six probes, connect each two solutions. What is there already is kept."""
    names = configs or ["sgd", "sgd_momentum", "adamw"]
    settings = [load_config(find_config(name), [f"seed={seed}", *(changes or ())]) for name in names]
    with progress_bar(quiet) as tick:
        run_fourway(output, settings, progress=tick)
    line_pictures(output)
    finish(output)
