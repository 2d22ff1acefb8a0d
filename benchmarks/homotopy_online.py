"""Does tuning α and κ* of the founders' rule while training help?  From right settings, and from a hundredfold off.

    python benchmarks/homotopy_online.py --data FOLDER --output benchmarks/results/homotopy_online.md

The MLP on MNIST of homotopy.py, SGD with momentum, 200 steps without decay; κ is about 2 for most of the run, so κ* = 3
is about right.
"""

import argparse
import statistics
from pathlib import Path

import torch
from homotopy_runs import Run, Training
from homotopy_tasks import TASKS
from table import machine, publish

from losslab.optim import OnlineTuning

ETA, STEPS, KAPPA = 0.3, 200, 3.0
FACTORS = {"100 × too large": 100.0, "right": 1.0, "100 × too small": 0.01}
RULES = {
    "seed, fixed κ*": lambda factor: {"rule": "seed", "target_curvature": KAPPA * factor},
    "seed_threshold, fixed κ*": lambda factor: {"rule": "seed_threshold", "target_curvature": KAPPA * factor},
    "seed, adaptive κ*, α instead": lambda factor: {"rule": "seed", "alpha": 1 / factor},
}


def final_loss(settings: dict[str, object], rate: float, seed: int, data: Path, steps: int) -> float:
    """Validation loss at the end of one run; infinite where it diverged."""
    run = Run("mnist", "momentum", {"lr": ETA, **settings}, seed, steps)
    training = Training(run, TASKS["mnist"].data(data), torch.device("cpu"))
    if rate:
        OnlineTuning(training.scheduler, rate=rate)
    return training.finish().record()["loss"]


def table(data: Path, seeds: int, steps: int) -> list[str]:
    """A row for each rule and μ."""
    lines = [f"| rule | μ | {' | '.join(FACTORS)} |", "| :-- | --: " + "| --: " * len(FACTORS) + "|"]
    for name, settings in RULES.items():
        for rate in (0.0, 0.1, 0.5):
            cells = []
            for factor in FACTORS.values():
                given = {**settings(factor), "examples": 32, "frequency": 10}
                losses = [final_loss(given, rate, seed, data, steps) for seed in range(seeds)]
                spread = statistics.stdev(losses) if seeds > 1 else 0.0
                cells.append(f"{statistics.mean(losses):.3f} ± {spread:.3f}")
            lines.append(f"| {name} | {rate or 'off'} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, help="file to write the page to, as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = f"- validation loss after {args.steps} steps at η₀ = {ETA}, without decay; mean ± standard deviation"
    lines = ["# α and κ* tuned online", "", *machine(("losslab", "torch")), f"{about} of {args.seeds} seeds", ""]
    publish([*lines, *table(args.data, args.seeds, args.steps)], args.output)


if __name__ == "__main__":
    main()
