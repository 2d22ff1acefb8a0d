"""What does a training step take with TALT, beside AdamW, SOAP and Muon, on the study's small networks?

    python benchmarks/talt_step.py --data FOLDER --output benchmarks/results/talt_step.md

Each round trains with every optimizer in turn. The first half of the steps is apart from the second: TALT renews its
bases after nearly every step at first, later after every tenth.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import torch
from optimizer_runs import Run, Training, numbers
from optimizer_tasks import TASKS
from table import machine, markdown, publish, spread

# Rates at which nothing diverges; a step takes as long at any other.
SETTINGS = {"adamw": {"lr": 1e-3}, "soap": {"lr": 3e-3}, "muon": {"lr": 1e-2}, "talt": {"lr": 3e-3}}
FACTORS = ("basis", "covariance")  # TALT's tensors that are there for each side rather than for each parameter
HEAD = ["optimizer", "model ms", "optimizer ms", "× AdamW's step", "later: optimizer ms", "× AdamW's step", "state"]
Costs = list[tuple[float, float]]


def trained(training: Training, steps: int) -> Costs:
    """Milliseconds of the processor's time, of each step's forward and backward pass and of its optimizer."""
    found = []
    for _ in range(steps):
        x, y = next(training.batches)
        began = time.process_time()
        training.optimizer.zero_grad()
        training.task.loss(training.model(x), y).backward()
        between = time.process_time()
        training.optimizer.step()
        found.append((1e3 * (between - began), 1e3 * (time.process_time() - between)))
    return found


def state_of(training: Training) -> str:
    """Numbers of state for each parameter; for TALT those apart from the factors, too."""
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    states = list(training.optimizer.state.values())
    shared = [value for state in states for name, value in state.items() if name.startswith(FACTORS)]
    total, factors = numbers(states) / parameters, numbers(shared) / parameters
    return f"{total:.1f}, {total - factors:.1f} apart from the factors" if shared else f"{total:.1f}"


def measured(
    task: str, optimizers: Sequence[str], args: argparse.Namespace
) -> tuple[dict[str, list[Costs]], list[str]]:
    """Of each optimizer, every round's costs, and what its state takes."""
    data = TASKS[task].data(args.data)
    runs = [Run(task, name, SETTINGS[name], seed=0, horizon=args.steps) for name in optimizers]
    costs: dict[str, list[Costs]] = {name: [] for name in optimizers}
    for run in runs:
        trained(Training(run, data), 1)  # what the first step of a process loads and chooses is nobody's
    for number in range(args.rounds):
        for run in runs if number % 2 == 0 else reversed(runs):
            training = Training(run, data)
            costs[run.optimizer].append(trained(training, args.steps))
    states = []
    for run in runs:
        training = Training(run, data)
        trained(training, 1)
        states.append(state_of(training))
    return costs, states


def rows(costs: dict[str, list[Costs]], states: list[str]) -> list[list[str]]:
    """One for each optimizer: early steps, later ones, state. AdamW is the first."""
    means = {  # of a half, one pair for each round
        (name, later): [tuple(fmean(column) for column in zip(*_half(each, later), strict=True)) for each in rounds]
        for name, rounds in costs.items()
        for later in (False, True)
    }
    step = {key: median(sum(pair) for pair in found) for key, found in means.items()}
    found = []
    for name, state in zip(costs, states, strict=True):
        cells = [name, spread([model for later in (False, True) for model, _ in means[name, later]], ".1f")]
        for later in (False, True):
            cells.append(spread([own for _, own in means[name, later]], ".1f"))
            cells.append(f"{step[name, later] / step['adamw', later]:.2f}")
        found.append([*cells, state])
    return found


def _half(costs: Costs, later: bool) -> Costs:
    middle = len(costs) // 2
    return costs[middle:] if later else costs[:middle]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz and mnist.npz")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["digits", "cifar10", "cifar10-32", "autoencoder"])
    parser.add_argument("--optimizers", nargs="+", choices=SETTINGS, default=["soap", "muon", "talt"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="file to write the tables to, as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    optimizers = ["adamw", *(name for name in args.optimizers if name != "adamw")]
    lines = ["# What a step of TALT takes", "", *machine(("losslab", "torch", "pytorch_optimizer"))]
    lines += [
        f"- processor's time of one thread, in turns: means over {args.steps // 2} steps, early and later ones",
        f"- median (smallest–largest) of {args.rounds} rounds; state: numbers for each parameter",
    ]
    for task in args.tasks:
        lines += ["", f"## {TASKS[task].title}, batches of {TASKS[task].batch_size}", ""]
        lines += markdown(HEAD, rows(*measured(task, optimizers, args)))
    publish(lines, args.output)


if __name__ == "__main__":
    main()
