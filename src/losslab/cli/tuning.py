"""`losslab tune`: the best settings of a configuration, by trials that any number of processes share."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from losslab.cli.terminal import Changes, Quiet, console, errors, progress_bar, stop_key
from losslab.report import tuning as page
from losslab.status import Status
from losslab.studies.config import load_config
from losslab.studies.config_file import ConfigError, assign, read_mapping
from losslab.studies.sections import RunConfig
from losslab.studies.shipped import find_config
from losslab.studies.spaces import Space, make_space, space_of
from losslab.studies.tune import TuneOptions
from losslab.studies.tune import tune as run_tuning
from losslab.studies.tuning.result import Tuned

SHOWN = 10  # trials in the terminal's table; the page has all


def tune(
    config: Annotated[str, typer.Argument(help="A YAML or JSON file, or the name of a shipped configuration.")],
    trials: Annotated[int, typer.Option("--trials", "--n-trials", help="Trials in all.")] = 20,
    space: Annotated[Path | None, typer.Option("--space", help="A YAML or JSON file: what may vary.")] = None,
    ranges: Annotated[
        list[str] | None,
        typer.Option("--set-space", help="a.b=LOW:HIGH, a.b=LOW:HIGH:log or a.b=X,Y,Z. May be repeated."),
    ] = None,
    include_theoretical_fixes: Annotated[
        bool, typer.Option("--include-theoretical-fixes", help="TALT's eight fixes too, each on or off.")
    ] = False,
    metric: Annotated[
        str, typer.Option("--metric", help="validation_loss or validation_accuracy.")
    ] = "validation_loss",
    pruner: Annotated[str, typer.Option("--pruner", help="asha, hyperband or none.")] = "asha",
    seed: Annotated[int, typer.Option("--seed", help="Of the sampler; the networks' is the configuration's.")] = 0,
    parallel: Annotated[int, typer.Option("--parallel", help="Processes on this machine.")] = 1,
    changes: Changes = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the study; default runs/tune-<name>.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Search the best settings of a configuration; without --space or --set-space, its optimizer's own.

    The same command on the same folder goes on with a stopped study, or joins one at work, also from another machine.
    """
    base = load_config(find_config(config), changes or ())
    options = TuneOptions(
        space=searched(base, space, ranges or (), with_fixes=include_theoretical_fixes),
        trials=trials,
        seed=seed,
        metric=metric,
        pruner=pruner,
        parallel=parallel,
    )
    folder = output or Path("runs") / f"tune-{base.name}"
    with progress_bar(quiet) as bar, stop_key(bar, unit="step") as tick:
        tuned = run_tuning(base, folder, options, progress=tick)
    show_tuned(folder)
    if tuned.status is not Status.complete:
        console.print(f"stopped: the same command with --output {folder} goes on", soft_wrap=True)
        raise typer.Exit(128 + tick.signal if tick.signal is not None else 1)  # as shells write a signal's end
    console.print(f"train it: losslab train {folder / 'best.yaml'}", soft_wrap=True)


def searched(base: RunConfig, file: Path | None, ranges: Iterable[str], *, with_fixes: bool = False) -> Space:
    """What may vary: of the file, with the ranges given in its place or beside it; or else the optimizer's own.

    Raises:
        ConfigError: For a range that is none, or TALT's fixes beside a space that is given.
    """
    values: dict[str, Any] = dict(read_mapping(file)) if file is not None else {}
    for text in ranges:
        key, equals, entry = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set-space {text}: expected KEY=LOW:HIGH, such as optimizer.lr=1e-4:1e-1:log")
        values[key.strip()] = _entry(text, entry)
    if not values:
        return space_of(base.optimizer.name, base.schedule.name, with_fixes=with_fixes)
    if with_fixes:
        raise ConfigError("--include-theoretical-fixes: it adds to TALT's own space; name the fixes in yours instead")
    return make_space(values, source="space")


def _entry(text: str, entry: str) -> Mapping[str, Any]:
    """Of LOW:HIGH, LOW:HIGH:log or X,Y,Z what a file would say."""
    if ":" not in entry:
        return {"choices": [_value(text, part) for part in entry.split(",")]}
    low, high, *scale = entry.split(":")
    if scale not in ([], ["log"]):
        raise ConfigError(f"--set-space {text}: expected LOW:HIGH or LOW:HIGH:log, got {entry}")
    return {"low": _value(text, low), "high": _value(text, high), "log": bool(scale)}


def _value(text: str, part: str) -> Any:
    """One value, read as YAML."""
    holder: dict[str, Any] = {}
    try:
        assign(holder, f"value={part}")
    except ConfigError as error:
        raise ConfigError(f"--set-space {text}: {str(error).rpartition(': ')[2]}") from None
    return holder["value"]


def show_tuned(folder: Path) -> None:
    """Make the page of a study, and print its best trials and where it is."""
    path, tuned = page.build(folder), Tuned.read(folder)
    heads, rows = page.heads(tuned), page.rows(tuned)
    shown = [index for index, head in enumerate(heads) if head not in ("steps", "seconds")]  # to fit 80 columns
    grid = Table(*(heads[index] for index in shown))
    for name, cells in rows[:SHOWN]:
        texts = [name, *(escape(cell.text) for cell in cells)]
        grid.add_row(*(texts[index] for index in shown))
    if rows:
        console.print(grid)
    if len(rows) > SHOWN:
        console.print(f"the best {SHOWN} of {len(rows)}; the report has all")
    console.print(page.in_words(tuned), highlight=False, soft_wrap=True)
    if tuned.importances:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in tuned.importances.items())
        console.print(f"importances, from {len(tuned.trials)} trials: {shares}", highlight=False, soft_wrap=True)
    for warning in tuned.warnings:
        errors.print(f"warning: {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {path}", soft_wrap=True)
