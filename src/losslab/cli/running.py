"""`losslab train`: one run, from a configuration, from flags, or both; stopped and gone on with."""

import shlex
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from losslab.cli.live import LiveTraining
from losslab.cli.terminal import Changes, Quiet, Stoppable, console, progress_bar, stop_key
from losslab.ranks import Ranks
from losslab.status import Status
from losslab.studies.aliases import FLAGS, SWITCHES, flag_assignments, refuse_unknown
from losslab.studies.config import from_assignments, load_config, make_config
from losslab.studies.config_file import ConfigError
from losslab.studies.lock import locked
from losslab.studies.record import RunFolder, Sink
from losslab.studies.sections import RunConfig
from losslab.studies.shipped import find_config
from losslab.studies.spaces import Space, space_of
from losslab.studies.tensorboard import FOLDER, TensorBoard
from losslab.studies.train import train as run_training
from losslab.studies.tune import TuneOptions, tune

TRIALS = 20  # of a search for which no other number is given


def train(
    context: typer.Context,  # holds all flags by their names in `FLAGS` and `SWITCHES`, and what is none
    config: Annotated[
        str | None, typer.Argument(help="A YAML or JSON file, or the name of a shipped configuration.")
    ] = None,
    config_file: Annotated[str | None, typer.Option("--config", help="The same.")] = None,
    name: Annotated[str | None, typer.Option(help="The run's name.")] = None,
    architecture: Annotated[str | None, typer.Option(help="A model of `losslab list`.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A data set of `losslab list`.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd, adam, adamw, talt, …; see `losslab list`.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training split.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    momentum: Annotated[float | None, typer.Option(help="Of SGD and Muon.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Pull of the weights to zero.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant, cosine, linear, cooldown, one_cycle, or homotopy: by the curvature.")
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="How long the learning rate rises.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the first weights and the examples' order.")] = None,
    mixed_precision: Annotated[
        bool | None, typer.Option("--mixed-precision", help="bfloat16 inside operations; see docs/coming-from.md.")
    ] = None,
    use_all_theoretical_fixes: Annotated[
        bool | None, typer.Option("--use-all-theoretical-fixes", help="TALT with all eight fixes.")
    ] = None,
    enhanced_config: Annotated[bool | None, typer.Option("--enhanced-config", help="The same.")] = None,
    monitor_theoretical_fixes: Annotated[
        bool | None,
        typer.Option("--monitor-theoretical-fixes", help="TALT's diagnostics, on TensorBoard's pages too."),
    ] = None,
    tune_hyperparams: Annotated[
        bool,
        typer.Option("--tune-hyperparams", help="Search its settings first; the folder then holds tuning/ and best/."),
    ] = False,
    n_trials: Annotated[int | None, typer.Option(min=1, help="Of that search, default 20; see `losslab tune`.")] = None,
    include_theoretical_fixes: Annotated[
        bool, typer.Option("--include-theoretical-fixes", help="Search TALT's eight fixes too, each on or off.")
    ] = False,
    changes: Changes = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", "--output-dir", help="Run folder; default runs/<name>.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in that folder.")] = False,
    board: Annotated[bool, typer.Option("--board", help="Write TensorBoard's files too; see `losslab board`.")] = False,
    histograms: Annotated[
        bool, typer.Option("--histograms", help="With --board: how weights and gradients are distributed.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Train one configuration into a run folder.

    Flags, then --set, change what the configuration says; without one they change the defaults. Ctrl-C and SIGTERM end
    the run after the present step, and --resume goes on with it.
    """
    refuse_unknown(config_file, filter(None, (config, *context.args)))
    given = [*flag_assignments({flag: context.params[flag] for flag in (*FLAGS, *SWITCHES)}), *(changes or ())]
    settings = _settings(config or config_file, given, output if resume else None)
    path = output or Path("runs") / settings.name
    for flag, wanted in (("--include-theoretical-fixes", include_theoretical_fixes), ("--n-trials", n_trials)):
        if wanted and not tune_hyperparams:
            raise ConfigError(f"{flag}: it is of a search; add --tune-hyperparams, or leave it out")
    if tune_hyperparams:
        space = space_of(settings.optimizer.name, settings.schedule.name, with_fixes=include_theoretical_fixes)
        settings = _tuned(settings, path / "tuning", space, n_trials or TRIALS, quiet)
        path = path / "best"
    with Ranks.joined() as ranks, progress_bar(quiet or ranks.rank > 0) as bar:
        live = LiveTraining(bar, batch_size=settings.dataset.batch_size, epochs=settings.training.epochs)
        sinks: list[Sink] = [live]
        if board or histograms or monitor_theoretical_fixes or (resume and (path / FOLDER).is_dir()):
            sinks.append(TensorBoard(path / FOLDER, settings.model_dump(mode="json"), with_histograms=histograms))
        folder = RunFolder(path)
        if ranks.rank == 0 and not (resume and folder.is_run()):
            RunFolder.create(path, overwrite=overwrite and folder.is_run())
        held = locked(path) if ranks.rank == 0 else nullcontext()  # a batch may be at work there
        with held, stop_key(live, unit="step") as tick:
            run_training(settings, folder, sinks=sinks, progress=tick, resume=resume)
    if ranks.rank == 0:
        _tell(folder, tick)


def _tuned(settings: RunConfig, folder: Path, space: Space, trials: int, quiet: bool) -> RunConfig:
    """The best of so many trials; a study that was stopped goes on."""
    options = TuneOptions(space=space, trials=trials)
    with progress_bar(quiet) as bar, stop_key(bar, unit="step") as tick:
        found = tune(settings, folder, options, progress=tick)
    if found.status is not Status.complete:
        console.print(f"stopped after {len(found.trials)} of {trials} trials; the same command goes on")
        raise typer.Exit(128 + tick.signal if tick.signal is not None else 1)
    metric = found.metric.replace("_", " ")
    console.print(f"{folder}: {metric} {found.value:.4g}, best of {trials} trials", soft_wrap=True)
    return found.best


def _settings(config: str | None, given: Iterable[str], resumed: Path | None) -> RunConfig:
    """The configuration: of a file, of flags, or of the run that is gone on with."""
    given = list(given)
    if config is not None:
        return load_config(find_config(config), given)
    if given:
        return from_assignments(given)
    if resumed is not None and RunFolder(resumed).is_run():
        return make_config(RunFolder(resumed).config, source=str(resumed / "config.json"))
    if resumed is not None:
        raise ConfigError(f"--resume: {resumed}: no run there; give its folder, or a configuration to begin one")
    raise ConfigError(
        "config: expected a configuration's name or file, or flags such as --architecture, --dataset and --optimizer, "
        "got none; `losslab list` names them"
    )


def _tell(folder: RunFolder, tick: Stoppable) -> None:
    """How it ended, and where it is."""
    rows = folder.metrics()
    final: Mapping[str, Any] = rows[-1] if rows and rows[-1]["kind"] == "final" else {}
    if not final and tick.signal is not None:
        command = f"losslab train --resume --output {shlex.quote(str(folder.path))}"
        console.print(f"stopped at step {tick.done:g}; go on with: {command}", soft_wrap=True, highlight=False)
        raise typer.Exit(128 + tick.signal)  # as shells write a signal's end
    ended = "" if final.get("status", "completed") == "completed" else f"{final['status']}, "
    if "test_accuracy" in final:
        ended += f"test accuracy {final['test_accuracy']:.1%}, test loss {final['test_loss']:.4g}"
    console.print(f"{folder.path}: {ended or 'trained'}", soft_wrap=True)
