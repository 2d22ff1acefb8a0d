"""Does a learning rate that follows curvature need less tuning, or end lower, than tuned schedules? At what cost?

    python benchmarks/homotopy.py --data FOLDER --processes 2 \\
        --output benchmarks/results/homotopy.md --figure docs/images/homotopy_warmup.png

Stages, in this order: grid (each method at each η₀, over tuning seeds), final (its best η₀ with fresh seeds), costs
(how many examples an estimate needs, how often), emerge (what curvature alone makes of the rate), time (what an
estimate costs; by one process on a quiet machine), report. Each finished run is kept in `--cache`: the command goes on
where it was ended, the same command in several terminals shares the work, and a cache that was filled on another
machine is read here. `--stages report` writes what is there and says what is missing; `--plan` says what is left, and
how long it takes.
"""

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from homotopy_methods import DEFAULT, FREQUENCY, METHODS, WARMED, estimates
from homotopy_report import page, write_figure, write_metrics
from homotopy_runs import HomotopyRuns, Run, Training
from homotopy_study import COUNTS, FREQUENCIES, Protocol, Study
from homotopy_tasks import SETTINGS, TASKS
from homotopy_times import measure
from optimizer_cache import Missing
from optimizer_runs import FINAL_SEED
from table import markdown, publish

STAGES = ("grid", "final", "costs", "emerge", "time", "report")
SHARED = STAGES[:4]  # by several processes
CACHE = Path("~/.cache/losslab/homotopy").expanduser()
COSTED = ("cifar10", "momentum")
QUICK = Protocol(tuning_seeds=1, seeds=2, length=0.03, every=3)


def wanted(study: Study, stage: str) -> Iterator[list[Run]]:
    """A stage's runs, those of one seed together: what matters most comes first.

    Raises:
        Missing: They depend on others that are not there, and may not be started.
    """
    task, optimizer = study.setting.task, study.setting.optimizer
    if stage == "grid":
        for seed in range(study.protocol.tuning_seeds):
            yield [r for h in study.horizons for name in METHODS for r in study.grid_runs(name, seed, h)]
    elif stage == "final":
        yield [r for h in study.horizons for name in study.contenders(h) for r in study.final_runs(name, h)]
    elif stage == "costs" and (task, optimizer) == COSTED:
        yield [r for count in COUNTS for frequency in FREQUENCIES for r in study.cost_runs(count, frequency)]
    elif stage == "emerge" and study.emerges:
        yield study.emerging_runs()


def work(args: argparse.Namespace) -> None:
    """Do the runs of all stages, together with other processes."""
    torch.set_num_threads(1)
    runs = HomotopyRuns(args.cache, args.data, args.device)
    chosen = studies(args, runs)
    for stage in [stage for stage in SHARED if stage in args.stages]:
        parts = [list(wanted(study, stage)) for study in chosen]
        for number in range(max(map(len, parts), default=0)):
            runs([run for part in parts if number < len(part) for run in part[number]])


def studies(args: argparse.Namespace, runs: HomotopyRuns) -> list[Study]:
    """One for each task and optimizer that was asked for and whose data are there."""
    protocol = QUICK if args.quick else Protocol(args.tuning_seeds, args.seeds, args.final_seed)
    return [
        Study(setting, runs, protocol)
        for setting in SETTINGS
        if setting.task in args.tasks and setting.optimizer in args.optimizers and not missing(setting.task, args)
    ]


def missing(task: str, args: argparse.Namespace) -> str | None:
    """Why a task cannot be run; a report needs no data."""
    return None if args.stages == ["report"] else TASKS[task].missing(args.data)


def plan(args: argparse.Namespace) -> list[str]:
    """Runs that are left, and the minutes of one core that they take, from ten steps of each kind."""
    runs = HomotopyRuns(args.cache, args.data, args.device, start=False)
    rows, total = [], 0.0
    for study in studies(args, runs):
        constant, due = (_step_seconds(study, name) for name in ("constant", DEFAULT))
        for stage in SHARED:
            try:
                left = [run for part in wanted(study, stage) for run in part if runs.found(run) is None]
                count = f"{len(left)}"
            except Missing:
                left, count = _typical(study), "about "
                count += str(len(left))
            if left:
                measured = [estimates(run.horizon, FREQUENCY) if "rule" in run.settings else 0 for run in left]
                spent = sum(run.horizon for run in left) * constant + sum(measured) * max(due - constant, 0.0)
                total += spent / 60
                rows.append([f"{study.setting.title}: {stage}", count, f"{spent / 60:.1f}"])
    return [
        *markdown(("runs that are left", "number", "core-minutes"), rows),
        "",
        f"Together {total:.0f} core-minutes.",
    ]


def _typical(study: Study) -> list[Run]:
    """As many final runs as there will be."""
    seeds, lr = study.final_seeds, study.rates[0]
    some = [name for name in METHODS if name not in WARMED[1:]]
    return [study.run(study.settings(name), lr, seed, h) for h in study.horizons for name in some for seed in seeds]


def _step_seconds(study: Study, method: str) -> float:
    """Mean of ten steps, each followed by an estimate if the method has any."""
    horizon = study.horizons[0]
    run = study.run(study.settings(method), study.rates[len(study.rates) // 3], 0, horizon)
    training = Training(run, study.runs.data_of(study.setting.task), study.runs.device, timed=True)
    for _ in range(min(14, horizon)):
        training.step()
    counted = training.seconds[4:] or training.seconds
    return sum(counted) / len(counted)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks, optimizers = ({getattr(s, name): None for s in SETTINGS} for name in ("task", "optimizer"))
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz, mnist.npz and SST-2")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=list(tasks))
    parser.add_argument("--optimizers", nargs="+", choices=optimizers, default=list(optimizers))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processes", type=int, default=1, help="that share the work; each uses one core")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--tuning-seeds", type=int, default=3)
    parser.add_argument("--seeds", type=int, help="final ones; the task's number by default")
    parser.add_argument("--final-seed", type=int, default=FINAL_SEED, help="the first of the final ones")
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, to see that it works")
    parser.add_argument("--plan", action="store_true", help="say what is left to do, and do nothing")
    parser.add_argument("--output", type=Path, help="file to write the page to, as well; metrics beside it")
    parser.add_argument("--figure", type=Path, help="file to draw what emerges to")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    if args.plan:
        publish(plan(args), None)
        return
    if set(SHARED) & set(args.stages):
        if args.processes == 1:
            work(args)
        else:
            _in_processes(args)
    if "time" in args.stages:
        for study in studies(args, HomotopyRuns(args.cache, args.data, args.device)):
            measure(study, args.rounds)
    if "report" in args.stages:
        report(args)


def _in_processes(args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(args,)) for _ in range(args.processes)]
    for worker in workers:
        worker.start()
        time.sleep(0.1)
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a process failed; see above")


def report(args: argparse.Namespace) -> None:
    """The page, the metrics of one run and the figure: of what is in the cache."""
    found = studies(args, HomotopyRuns(args.cache, args.data, args.device, start=False))
    publish(page(found), args.output)
    if args.output:
        write_metrics(found, args.output.with_name(f"{args.output.stem}_mnist.csv"))
    if args.figure:
        write_figure(found, args.figure)


if __name__ == "__main__":
    main()
