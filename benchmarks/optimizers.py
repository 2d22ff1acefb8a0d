"""Is TALT fast? Steps and time to a loss, against tuned rivals, on six tasks; which of its parts earn their keep.

    python benchmarks/optimizers.py --data FOLDER --tasks digits characters --output benchmarks/results/optimizers.md

Stages, in this order: tune, final (the tuned settings with fresh seeds: the target), horizons (how few steps reach it),
time (on a quiet machine, by one process), rival (the best rival's own target). Each finished run is kept in `--cache`:
the command goes on where it was ended, and the same command in several terminals shares the work. `--stages report`
writes what is there and says what is missing, and all runs beside it; `--restore` fills the cache from that file.
"""

import argparse
from pathlib import Path

import torch
from optimizer_ablation import BATCHES, VARIANTS, ablation_lines, sensitivity_lines
from optimizer_archive import pack, unpack
from optimizer_cache import Runs
from optimizer_report import findings, summary_lines, task_lines
from optimizer_study import OPTIMIZERS, RIVALS, Protocol, Study
from optimizer_tasks import DEFAULT, TASKS
from optimizer_times import measure
from table import machine, publish

STAGES = ("tune", "final", "horizons", "time", "rival", "ablation", "sensitivity", "report")
CACHE = Path("~/.cache/losslab/optimizers").expanduser()
PROTOCOL = """\
- {trials} quasi-random trials for each optimizer on one seed, the best {again} on {tuning_seeds} seeds; four more
  trials for each decade by which a range of learning rates was extended; all by the final validation loss. Next best:
  by how much the second of the three is worse, mean of these seeds
- schedule, for all: up for 5 % of the horizon, then down to zero in a straight line (schedule-free's authors use none)
- target: the better of SGD with momentum and AdamW, its median final validation loss at horizon T over fresh seeds
- steps to the target: horizons T·2^(k/2), k from −6 to 2, each a run of its own; between two by the logarithm; 95 %
  bootstrap intervals over seeds, ratios in pairs of equal seeds; a seed that never arrives counts as infinite
- time: steps × mean step (forward, backward, optimizer) of a run as long as the steps to the target, T/2 at most; in
  turns, median of the rounds; evaluation excluded; one thread. The interval is that of the steps
- state: numbers for each parameter. Test accuracy was looked at for the final seeds only, and decided nothing
- a factor is printed only where the whole interval exceeds it"""


def work(study: Study, optimizers: list[str], stages: list[str], rounds: int) -> None:
    """Do what the stages need, for one task."""
    for name in study.runs.shuffled(optimizers):
        if "tune" in stages:
            study.tuned(name)
        if "final" in stages:
            study.final(name)
    target = study.target()[0] if {"horizons", "time"} & set(stages) else 0.0
    if "horizons" in stages:
        for name in study.runs.shuffled(optimizers):
            study.arrivals(name, target)
    if "time" in stages:
        measure(study, optimizers, rounds)
    if "rival" in stages:
        highest, name = study.target([name for name in RIVALS if name in optimizers])
        for each in (name, "talt"):
            study.arrivals(each, highest)


def report(args: argparse.Namespace, tasks: list[str], skipped: dict[str, str], protocol: Protocol) -> list[str]:
    """The page."""
    runs = Runs(args.cache, args.data, start=False)
    found = [findings(Study(TASKS[name], runs, protocol), args.optimizers) for name in tasks]
    packages = ("losslab", "torch", "pytorch_optimizer")
    lines = ["# How fast is TALT?", "", *machine(packages), *PROTOCOL.format(**vars(protocol)).splitlines(), ""]
    lines += summary_lines(found) if found else []
    for each in found:
        lines += task_lines(each)
    lines += [f"Not run: {name}, {reason}." for name, reason in skipped.items()]
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        pack(args.cache, tasks, args.output.with_name(f"{args.output.stem}_runs.jsonl.xz"))
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz, mnist.npz and SST-2")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=DEFAULT)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["tune", "final", "horizons", "time", "report"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--restore", type=Path, help="a file of runs that are put into the cache first")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--seeds", type=int, help="final ones; the task's number by default")
    parser.add_argument("--length", type=float, default=1.0, help="what all horizons are multiplied by")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of the ablation")
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES, help="sizes, of the ablation")
    parser.add_argument("--output", type=Path, help="file to write the page to, as well")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    if args.restore:
        print(f"{unpack(args.restore, args.cache)} runs restored", flush=True)
    protocol = Protocol(trials=args.trials, seeds=args.seeds, length=args.length)
    skipped = {name: reason for name in args.tasks if (reason := TASKS[name].missing(args.data))}
    tasks = [name for name in args.tasks if name not in skipped]
    runs = Runs(args.cache, args.data)
    for name in tasks:
        study = Study(TASKS[name], runs, protocol)
        work(study, args.optimizers, args.stages, args.rounds)
    if "report" in args.stages:
        publish(report(args, tasks, skipped, protocol), args.output)
    for stage, lines, chosen in (
        ("ablation", ablation_lines, (args.variants, args.batches)),
        ("sensitivity", sensitivity_lines, (args.optimizers,)),
    ):
        if stage in args.stages:
            pages = [line for name in tasks for line in lines(Study(TASKS[name], runs, protocol), *chosen)]
            suffixed = args.output.with_name(f"{args.output.stem}_{stage}.md") if args.output else None
            publish([f"# TALT: {stage}", "", *machine(("losslab", "torch")), "", *pages], suffixed)


if __name__ == "__main__":
    main()
