"""What products with the gradient covariance cost, explicit and implicit, and what the neural tangent kernel costs.

    python benchmarks/example_gradients.py --data FOLDER --output benchmarks/results/example_gradients.md

Why `GradientCovariance` chooses as it does: compare its four columns along "operations". Seconds are the processor's
own, so that other programs on the machine take less part in them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from data import Batches, images, in_batches
from table import machine, markdown, publish
from torch import Tensor, nn

from losslab import EmpiricalRisk, GradientCovariance, NeuralTangentKernel
from losslab.operators.base import LinearOperator
from losslab.operators.example_gradients import Examples, backward_flops, example_loss
from losslab.studies.models import SimpleCNN

AMPLE = 1 << 40  # bytes: everything is kept
Problem = tuple[nn.Module, Batches]


class Positions(nn.Module):
    """Two hidden layers applied at each of several positions, whose outputs are averaged: each weight is used there."""

    def __init__(self, width: int = 256):
        super().__init__()
        hidden = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


class Transformer(nn.Module):
    """Two encoder blocks of width 64 over tokens, averaged."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
        self.embedding, self.head = nn.Embedding(256, 64), nn.Linear(64, 10)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(x)).mean(1))


def lenet() -> nn.Module:
    features = [nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*features, nn.Flatten(), *head)


def mlp() -> nn.Module:
    hidden = [nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))


def problems(data: Path | None, count: int) -> dict[str, Problem]:
    """Networks whose weights are used at one place of an example, at some, and at very many."""
    x, y = images(data, count)
    tokens = torch.randint(256, (count, 128), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    found: dict[str, tuple[nn.Module, Tensor]] = {"MLP 3072-256-256-10": (mlp(), x)}
    for places in (4, 16, 64):
        found[f"MLP 256-256-256-10 at {places} positions"] = (Positions(), torch.randn(count, places, 256))
    found["LeNet-5"] = (lenet(), x)
    found["SimpleCNN, 8×8 digits"] = (SimpleCNN(1, 10, width=32), x.mean(1, keepdim=True)[..., 12:20, 12:20])
    for length in (8, 32, 128):
        found[f"Transformer, {length} tokens"] = (Transformer(), tokens[:, :length])
    found["SimpleCNN, CIFAR-10"] = (SimpleCNN(3, 10), x)
    return {name: (model.eval(), in_batches(inputs, y, 125)) for name, (model, inputs) in found.items()}


def seconds(function: Callable[[], object]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def costs(operator: LinearOperator, rounds: int) -> tuple[float, float]:
    """Seconds of a product with one vector, and of each in a block of eight, once all is kept that will be."""
    vectors = torch.randn(operator.size, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        operator @ vectors[:, 0]
    one = statistics.median(seconds(lambda: operator @ vectors[:, 0]) for _ in range(rounds))
    return one, statistics.median(seconds(lambda: operator @ vectors) for _ in range(rounds)) / 8


def covariance_row(name: str, problem: Problem, rounds: int) -> list[str]:
    model, batches = problem
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), batches, check=False)
    leaves, (batch, targets) = risk.leaves(risk.space.vector()), batches[0]
    with risk.evaluating():
        example = Examples((batch, targets), len(targets)).one(0)
        flops = backward_flops(leaves, example, example_loss(risk)) / risk.space.size
    risk.gradient()
    g = statistics.median(seconds(risk.gradient) for _ in range(2 * rounds + 1))
    cells, sizes = [], []
    for method in ("implicit", "explicit"):
        for memory in (AMPLE, 0):
            risk.graph_memory = memory
            operator = GradientCovariance(risk, centred=False, method=method)
            cells.append(", ".join(f"{cost / g:.2f}" for cost in costs(operator, rounds)))
            if memory:
                sizes.append(f"{operator.kept_bytes / 2**20:.0f}")
    return [name, f"{risk.space.size:,}", f"{flops:.0f}", f"{g:.3f} s", *cells, ", ".join(sizes)]


def kernel_row(name: str, problem: Problem, rounds: int, examples: int) -> list[str]:
    model, batches = problem
    x, y = batches[0][0][:examples], batches[0][1][:examples]
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), in_batches(x, y, 50), check=False, graph_memory=AMPLE)
    risk.gradient()
    g = statistics.median(seconds(risk.gradient) for _ in range(2 * rounds + 1))
    kernel = NeuralTangentKernel(risk)
    products = [f"{cost / g:.2f}" for cost in costs(kernel, rounds)]
    risk.graph_memory = 0
    products += [f"{cost / g:.2f}" for cost in costs(NeuralTangentKernel(risk), rounds)]
    risk.graph_memory = AMPLE
    dense, rows = seconds(kernel.to_dense) / g, seconds(kernel._from_rows) / g
    return [name, f"{kernel.size:,}", *products, f"{dense:.0f}", f"{rows:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz; without it synthetic images")
    parser.add_argument("--examples", type=int, default=250)
    parser.add_argument("--kernel-examples", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="networks whose names contain this")
    parser.add_argument("--output", type=Path, help="file to write the tables to, as well")
    args = parser.parse_args()
    chosen = {n: p for n, p in problems(args.data, args.examples).items() if args.only in n}
    lines = ["# Per-example gradients", "", *machine(("losslab", "torch"))]
    lines += [
        f"- {args.examples} examples in batches of 125 (covariance), {args.kernel_examples} in batches of 50 (kernel)",
        f"- processor seconds in units of one gradient g on the same data, medians of {args.rounds} rounds, float32",
        "- operations: in one example's backward pass, a parameter; cells: a product of one vector, and each of eight",
        "- made anew: with `graph_memory=0`; MiB: what is kept, implicit and explicit",
    ]
    header = ["gradient covariance", "parameters", "operations", "g", "implicit", "implicit, made anew"]
    header += ["explicit, held", "explicit, made anew", "MiB"]
    lines += ["", *markdown(header, [covariance_row(n, p, args.rounds) for n, p in chosen.items()])]
    header = ["neural tangent kernel", "size", "product", "of eight", "made anew", "of eight", "`to_dense`", "by rows"]
    some = {n: p for n, p in chosen.items() if n.startswith(("SimpleCNN", "MLP 3072", "Transformer, 32"))}
    rows = [kernel_row(n, p, args.rounds, args.kernel_examples) for n, p in some.items()]
    lines += ["", *markdown(header, rows)]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
