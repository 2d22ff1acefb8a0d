"""May a rate rise again when the batches are fitted?  Training that goes on long after that, with and without a bound.

    python benchmarks/homotopy_long.py --data FOLDER --output benchmarks/results/homotopy_long.md

The MLP on MNIST of homotopy.py, seven times as long. The rule "stable" keeps its rate below limit/λ for the largest λ
that was ever reckoned with; "forgetful" is the same rule without that. A schedule is there to compare with.
"""

import argparse
from pathlib import Path

import torch
from homotopy_adaptive import RATES
from homotopy_methods import DEFAULT, settings_of
from homotopy_runs import Run, Training
from homotopy_tasks import TASKS
from homotopy_text import with_worst
from table import machine, markdown, publish

from losslab.optim import HomotopyLR

SCHEDULE = "warm-up 10%, cosine"
LOWER = {"adamw": (0.00316,), "momentum": (0.0316, 0.1)}  # where schedules are best


def final_loss(optimizer: str, method: str, lr: float, seed: int, data: Path, steps: int) -> float:
    """Validation loss at the end of one run; infinite where it diverged."""
    settings = settings_of(DEFAULT if method == "forgetful" else method, optimizer)
    training = Training(
        Run("mnist", optimizer, {"lr": lr, **settings}, seed, steps), TASKS["mnist"].data(data), torch.device("cpu")
    )

    def forget() -> None:
        if method == "forgetful":
            assert isinstance(training.scheduler, HomotopyLR)
            training.scheduler.rule.sharpest = 0.0

    return training.finish(after=forget).record()["loss"]


def table(optimizer: str, data: Path, seeds: int, steps: int) -> list[str]:
    """A row for each method, a column for each η₀."""
    rates, rows = sorted((*LOWER[optimizer], *RATES[optimizer])), []
    for method in (SCHEDULE, DEFAULT, "forgetful"):
        cells = []
        for lr in rates:
            losses = [final_loss(optimizer, method, lr, seed, data, steps) for seed in range(seeds)]
            cells.append(with_worst(losses))
        rows.append([method, *cells])
    return markdown((f"{optimizer}, η₀", *(f"{lr:g}" for lr in rates)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="file to write the page to, as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = f"- validation loss after {args.steps} steps; mean, and the worst of {args.seeds} seeds"
    lines = ["# Training on after the batches are fitted", "", *machine(("losslab", "torch")), about, ""]
    for optimizer in LOWER:
        lines += [*table(optimizer, args.data, args.seeds, args.steps), ""]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
