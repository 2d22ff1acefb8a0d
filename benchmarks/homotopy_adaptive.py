"""May an optimizer whose preconditioner adapts pass over a single sharp batch?  May another?

    python benchmarks/homotopy_adaptive.py --data FOLDER --output benchmarks/results/homotopy_adaptive.md

The MLP on MNIST of homotopy.py with the rule "stable", each optimizer as it is and taken for the other kind. For one
that is taken for adaptive the median of its last three estimates counts; for another the largest, from the first on.
"""

import argparse
from pathlib import Path

import torch
from homotopy_methods import EXAMPLES, FREQUENCY
from homotopy_runs import Run, Training
from homotopy_tasks import TASKS
from homotopy_text import with_worst
from table import machine, markdown, publish

RATES = {
    "adamw": (0.01, 0.0316, 0.1, 0.316, 1.0),
    "talt": (0.01, 0.0316, 0.1, 0.316, 1.0),
    "momentum": (0.316, 1.0, 3.16, 10.0, 31.6),
}


Row = tuple[str, bool, dict[str, float]]  # optimizer, whether it is taken for adaptive, and fractions of one's own
ROWS: list[Row] = [(name, kind, {}) for name in RATES for kind in (True, False)]
ROWS.insert(4, ("talt", True, {"fraction": 0.3, "late_fraction": 0.3}))


def trained(row: Row, lr: float, seed: int, data: Path, steps: int) -> Training:
    """One run, done."""
    optimizer, adaptive, fractions = row
    settings = {"rule": "stable", "examples": EXAMPLES, "frequency": FREQUENCY, "lr": lr, **fractions}
    training = Training(Run("mnist", optimizer, settings, seed, steps), TASKS["mnist"].data(data), torch.device("cpu"))
    training.scheduler.rule.adaptive = adaptive
    return training.finish()


def table(data: Path, seeds: int, steps: int) -> list[str]:
    """A row for each optimizer and what it is taken for; the η₀ are in the cells."""
    rows = []
    for row in ROWS:
        optimizer, adaptive, _ = row
        cells = []
        for lr in RATES[optimizer]:
            done = [trained(row, lr, seed, data, steps) for seed in range(seeds)]
            losses = [training.record()["loss"] for training in done]
            cells.append(f"{lr:g}: {with_worst(losses)}")
        part = done[0].scheduler.options.part
        taken = f"{part(0):g} to {part(steps):g}"
        rows.append([optimizer, "adaptive" if adaptive else "of fixed P", taken, *cells])
    return markdown(("optimizer", "taken for", "of the limit", *["η₀: loss (worst)"] * 5), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=TASKS["mnist"].horizon)
    parser.add_argument("--output", type=Path, help="file to write the page to, as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = f"- validation loss after {args.steps} steps; mean, and the worst of {args.seeds} seeds"
    lines = ["# What adaptive optimizers bear", "", *machine(("losslab", "torch")), about, ""]
    publish([*lines, *table(args.data, args.seeds, args.steps)], args.output)


if __name__ == "__main__":
    main()
