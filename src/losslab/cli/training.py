"""`losslab demo` and `losslab study`: what trains several."""

from pathlib import Path
from typing import Annotated

import typer

from losslab.cli.terminal import Changes, Output, Quiet, console, finish, progress_bar
from losslab.report.lines import line_pictures
from losslab.studies.config import load_config
from losslab.studies.demo import QUICK, DemoSettings
from losslab.studies.demo import demo as run_demo
from losslab.studies.fourway import fourway as run_fourway
from losslab.studies.record import RunFolder
from losslab.studies.shipped import find_config


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller settings: half a minute.")] = False,
    output: Output = Path("runs/demo"),
    quiet: Quiet = False,
) -> None:
    """Train three optimizers on real digits, probe their solutions, and write a report."""
    with progress_bar(quiet) as tick:
        try:
            run_demo(output, QUICK if quick else DemoSettings(), progress=tick)
        except KeyboardInterrupt:
            console.print("stopped: the report shows what was measured by then")
            if output.is_dir() and any(RunFolder(child).is_run() for child in output.iterdir()):
                finish(output)
            raise
    finish(output)


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
