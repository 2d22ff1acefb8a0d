"""`losslab probe` and `losslab analyze`: measure at a solution."""

from pathlib import Path
from typing import Annotated, Any

import typer

from losslab.analyzer.metrics import in_words
from losslab.cli.terminal import Changes, Quiet, console, finish, progress_bar, show, stop_key
from losslab.ranks import ALONE, Ranks
from losslab.studies.aliases import assignments, probe_name
from losslab.studies.analysis import Analysis
from losslab.studies.analysis import analyze as run_analysis
from losslab.studies.config import load_config
from losslab.studies.config_file import assign
from losslab.studies.devices import find_device
from losslab.studies.probing import find_probe, measure, plan_of, risk_of, shares_points
from losslab.studies.shipped import find_config
from losslab.studies.solution import find_solution

# How typer is told to leave the settings of a probe, which only the probe knows, to `probe`.
TAKES_SETTINGS = {"allow_extra_args": True, "ignore_unknown_options": True}


def probe(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Which probe; see `losslab list`.")],
    # torchrun takes --run for an abbreviation of an option of its own, wherever it stands.
    run: Annotated[
        Path | None, typer.Option("--run", "--from", help="Run folder of the solution; --from under torchrun.")
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", "--ckpt-b", "--ckpt_b", help="The second solution: a run folder, or a file of weights."),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", "--ckpt-a", "--ckpt_a", help="last, best, or a file of weights.")
    ] = "last",
    config: Annotated[
        str | None, typer.Option("--config", help="The configuration, where the weights belong to no run folder.")
    ] = None,
    settings: Changes = None,
    max_examples: Annotated[int | None, typer.Option("--max-examples", help="A fixed random part of the data.")] = None,
    device: Annotated[
        str, typer.Option("--device", help="auto (a CUDA device if there is one), cpu, cuda, mps.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost (spectrum).")] = False,
    quiet: Quiet = False,
) -> None:
    """Measure one thing at a solution and keep it in the run folder. Under torchrun, with all its processes.

    Any other option is a setting of the probe: --k 3 is the same as --set k=3.
    """
    row = find_probe(probe_name(name))
    chosen: dict[str, Any] = {}
    for change in [*(settings or ()), *assignments(row.name, context.args)]:
        assign(chosen, change)
    solution = find_solution(run, checkpoint, config)
    place = find_device(device)
    other = None
    if to is not None:
        other = find_solution(to, "last") if to.is_dir() else find_solution(None, to, config)
    with Ranks.joined() as ranks, progress_bar(quiet or ranks.rank > 0) as bar, stop_key(bar) as tick:
        solution.model.to(place)
        risk = risk_of(solution, ranks=ALONE if shares_points(row) else ranks, max_examples=max_examples)
        if dry_run:
            text = str(plan_of(row, risk, chosen))
            if ranks.rank == 0:
                console.print(text, highlight=False)
            return
        result = measure(row, solution, other, settings=chosen, risk=risk, progress=tick, ranks=ranks)
    if ranks.rank == 0:
        show(row, result)


def analyze(
    model: Annotated[str, typer.Option("--model", help="A model of `losslab list`.")] = "simple_cnn",
    dataset: Annotated[str, typer.Option("--dataset", help="A data set of `losslab list`.")] = "digits",
    save_dir: Annotated[Path, typer.Option("--save-dir", help="Folder for the run.")] = Path("runs"),
    compute_hessian: Annotated[bool, typer.Option("--compute-hessian", help="The Hessian's spectrum too.")] = False,
    visualize: Annotated[bool, typer.Option("--visualize", help="The loss on a plane too.")] = False,
    track_trajectory: Annotated[
        bool, typer.Option("--track-trajectory", help="The way there too: snapshots while it trains.")
    ] = False,
    config: Annotated[str, typer.Option("--config", help="What --model and --dataset do not say.")] = "adamw",
    changes: Changes = None,
    quiet: Quiet = False,
) -> None:
    """Train one network, measure its landscape, and write a report: curvature, sharpness, plane, trajectory."""
    named = [f"name={model}-{dataset.rpartition('/')[2]}".replace(":", "-"), f"model.name={model}"]
    settings = load_config(find_config(config), [*named, f"dataset.name={dataset}", *(changes or ())])
    wanted = Analysis(hessian=compute_hessian, visualize=visualize, trajectory=track_trajectory)
    with progress_bar(quiet) as tick:
        results = run_analysis(settings, save_dir / settings.name, wanted, progress=tick)
    finish(save_dir / settings.name)
    console.print(in_words(results.values()), highlight=False, soft_wrap=True)
