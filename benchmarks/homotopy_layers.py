"""Is a rate for each layer better than one for all?

    python benchmarks/homotopy_layers.py --data FOLDER --output benchmarks/results/homotopy_layers.md

The MLP on MNIST and the CNN on CIFAR-10 of homotopy.py with the rule "stable": one rate for all parameters, one for
each layer from its own block of the Hessian ("blocks"), and from all blocks together ("joint"). Each with the part of
the limit that it begins with all along, and with the one that grows, so that the step's length is not taken for the
layers' merit.
"""

import argparse
from pathlib import Path

import torch
from homotopy_methods import EXAMPLES, FREQUENCY, settings_of
from homotopy_runs import Run, Training
from homotopy_tasks import TASKS
from homotopy_text import with_worst
from table import machine, markdown, publish

from losslab.optim import PerLayerHomotopyLR, by_module
from losslab.optim.homotopy.layer_curvature import Method
from losslab.optim.homotopy.options import LATE

RATES = {
    ("mnist", "momentum"): (0.1, 0.316, 1.0, 3.16),
    ("mnist", "adamw"): (0.01, 0.0316, 0.1, 0.316),
    ("cifar10", "momentum"): (0.1, 0.316, 1.0, 3.16),
    ("cifar10", "adamw"): (0.01, 0.0316, 0.1, 0.316),
}
LAYERS: dict[str, Method | None] = {"one rate": None, "layers, blocks": "blocks", "layers, joint": "joint"}
STEADY = ", one part all along"
ROWS = [f"{name}{ending}" for name in LAYERS for ending in (STEADY, "")]


def final_loss(task: str, optimizer: str, row: str, lr: float, seed: int, data: Path, steps: int) -> float:
    """Validation loss at the end of one run; infinite where it diverged."""
    method = LAYERS[row.removesuffix(STEADY)]
    own = settings_of("stable", optimizer)
    fractions = {"fraction": own["fraction"], "late_fraction": own["fraction"] if row.endswith(STEADY) else LATE}
    run = Run(task, optimizer, {"lr": lr, **own, **fractions}, seed, steps)
    training = Training(run, TASKS[task].data(data), torch.device("cpu"))
    if method is not None:
        training.scheduler = PerLayerHomotopyLR(
            training.optimizer,
            training.loss_of,
            layers=by_module(training.model),
            method=method,
            examples=EXAMPLES,
            frequency=FREQUENCY,
            total_steps=steps,
            **fractions,
        )
    return float(training.finish().record()["loss"])


def table(task: str, optimizer: str, data: Path, seeds: int, steps: int | None) -> list[str]:
    """A row for each way, a column for each η₀."""
    rates, rows = RATES[task, optimizer], []
    steps = steps or TASKS[task].horizon
    for row in ROWS:
        cells = []
        for lr in rates:
            losses = [final_loss(task, optimizer, row, lr, seed, data, steps) for seed in range(seeds)]
            cells.append(with_worst(losses))
        rows.append([row, *cells])
    return markdown((f"{optimizer}, η₀", *(f"{lr:g}" for lr in rates)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist.npz and cifar10.npz")
    parser.add_argument("--tasks", nargs="+", choices=("mnist", "cifar10"), default=["mnist", "cifar10"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="by default the task's own number")
    parser.add_argument("--output", type=Path, help="file to write the page to, as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["# One rate for all, or one for each layer", "", *machine(("losslab", "torch"))]
    lines += [f"- validation loss at the end; mean, and the worst of {args.seeds} seeds", ""]
    for task, optimizer in RATES:
        if task in args.tasks:
            lines += [f"## {TASKS[task].title}", ""] if f"## {TASKS[task].title}" not in lines else []
            lines += [*table(task, optimizer, args.data, args.seeds, args.steps), ""]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
