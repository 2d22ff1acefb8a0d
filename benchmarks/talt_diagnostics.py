"""What do TALT's diagnostics cost, of a training step, at one sample every 100 steps?

    python benchmarks/talt_diagnostics.py --output benchmarks/results/talt_diagnostics.md

Steps without and with a sample in turns, in one process: medians, and (with - without) / (100 · without).
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from table import machine, markdown, publish, spread
from torch import nn
from torch.nn.functional import cross_entropy

from losslab.optim.diagnostics import TALTDiagnostics
from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.talt import TALT
from losslab.studies.models import SimpleCNN

EVERY = 100


def _cnn() -> tuple[nn.Module, tuple[int, ...]]:
    return SimpleCNN(3, 10, width=64), (128, 3, 32, 32)


def _small_cnn() -> tuple[nn.Module, tuple[int, ...]]:
    return SimpleCNN(1, 10, width=32), (64, 1, 8, 8)


def _mlp() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)), (128, 784)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "SimpleCNN 64, 32×32, batch 128": _cnn,
    "SimpleCNN 32, 8×8, batch 64": _small_cnn,
    "MLP 784-256-256-10, batch 128": _mlp,
}


def measured(make: Callable[[], tuple[nn.Module, tuple[int, ...]]], rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds of steps without a sample and of steps with one."""
    torch.manual_seed(0)
    model, shape = make()
    x, y = torch.randn(shape), torch.randint(0, 10, shape[:1])
    options = TALTOptions()
    optimizer = TALT(model.parameters(), options=options)
    diagnostics = TALTDiagnostics(optimizer, every=2)
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(1, 2 * rounds + 101):
        began = time.perf_counter()
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if step > 100 and options.next_due(step - 1) != step:
            times[step % 2 == 0].append(1e3 * (time.perf_counter() - began))
    assert diagnostics.records()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--output", type=Path, help="file to write the table to, as well")
    args = parser.parse_args()
    rows = []
    for name, make in NETWORKS.items():
        plain, sampled = measured(make, args.rounds)
        share = (median(sampled) - median(plain)) / (EVERY * median(plain))
        rows.append([name, spread(plain, ".1f"), spread(sampled, ".1f"), f"{100 * share:.2f} %"])
        print(rows[-1], flush=True)
    lines = ["# What TALT's diagnostics cost", "", *machine(("losslab", "torch"))]
    lines += [
        f"- {args.rounds} steps of each kind in turns, those with a refresh left out: median (smallest–largest) in ms",
        "",
    ]
    publish([*lines, *markdown(["network", "step", "sampled step", f"one in {EVERY}"], rows)], args.output)


if __name__ == "__main__":
    main()
