"""The solvers' own cost: the share of a run's time that is not spent in products, and on what it goes.

    python benchmarks/overhead.py --output benchmarks/results/overhead.md

Ten million parameters, ten eigenpairs, and the spectrum probe. The profile is the standard library's, which counts
every Python function: products are making gradient graphs and passing through them, the rest is the solver's. It needs
no data.
"""

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from data import synthetic
from fresh_process import seconds_of
from problem import Problem, gradient
from table import machine, markdown, publish
from torch import nn

from losslab import Hessian, eigenpairs, spectrum
from losslab.studies.models import SimpleCNN

PRODUCTS = [("gradient_graph.py", "__init__"), ("gradient_graph.py", "add_products")]
# What the solver does outside of products, by functions of which none calls another.
PARTS = {
    "orthogonalisation": [("ranks.py", "dots"), ("ranks.py", "take_out")],
    "norms": [("ranks.py", "norm")],
    "eigenvalues of T": [("krylov.py", "ritz")],
    "random vectors": [("random.py", "gaussian"), ("random.py", "rademacher")],
    "Ritz vectors and restarts": [("krylov.py", "_combine")],
    "memory for the basis": [("krylov.py", "new_basis")],
}
SOLVERS: dict[str, Callable[[Any, int], Any]] = {
    "eigenpairs": lambda risk, k: eigenpairs(Hessian(risk), k),
    "spectrum": spectrum,
}


def mlp(size: int) -> nn.Module:
    """3072-4w-2w-10 for 32×32 images, of about `size` parameters."""
    width = round(((12314**2 + 32 * size) ** 0.5 - 12314) / 16)  # of 8w² + 12314w = size
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 4 * width), nn.ReLU(), nn.Linear(4 * width, 2 * width), nn.ReLU(),
        nn.Linear(2 * width, 10),
    )  # fmt: skip


def cnn(size: int) -> nn.Module:
    """A SimpleCNN of about `size` parameters."""
    return SimpleCNN(3, 10, width=round((size / 43.5) ** 0.5))


NETWORKS = {"mlp": mlp, "cnn": cnn}


def profiled(solve: Callable[[], Any]) -> tuple[Any, float, dict[str, tuple[int, float]]]:
    """What it returns, its seconds, and (calls, seconds) of products and of each part; the last entry is the rest."""
    profile = cProfile.Profile()
    began = time.perf_counter()
    result = profile.runcall(solve)
    seconds = time.perf_counter() - began
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]  # (file, line, name): calls, …, cumulative, …

    def spent(functions: list[tuple[str, str]]) -> tuple[int, float]:
        rows = [row for (path, _, name), row in stats.items() for f, n in functions if path.endswith(f) and name == n]
        return sum(row[1] for row in rows), sum(row[3] for row in rows)

    parts = {"products": spent(PRODUCTS)} | {part: spent(functions) for part, functions in PARTS.items()}
    rest = seconds - sum(time for _, time in parts.values())
    return result, seconds, parts | {"everything else": (1, rest)}


def measure(name: str, problem: Problem, k: int) -> tuple[list[list[str]], str]:
    """A row for each part, and what they mean together."""
    risk = problem.risk()
    result, seconds, parts = profiled(lambda: SOLVERS[name](risk, k))
    number, products = result.matvecs, parts["products"][1]
    own = seconds - products
    rows = [[name, f"{seconds:.1f}", "100 %", ""]]
    rows += [[part, f"{time:.2f}", f"{time / seconds:.1%}", str(calls)] for part, (calls, time) in parts.items()]
    enough = 19 * own / number  # 5 % of the whole is 1/19 of the products
    return rows, (
        f"- {name}: {number} products of {products / number:.2f} s; the solver's own {own:.1f} s are"
        f" {own / seconds:.1%} of the run, {own / number:.3f} s a product, so below 5 % where a product takes"
        f" more than {enough:.1f} s; {result.status}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--network", choices=NETWORKS, default="mlp")
    parser.add_argument("--examples", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("-k", type=int, default=10, help="eigenpairs")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--output", type=Path, help="file to write the tables to, as well")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = NETWORKS[args.network](args.parameters)
    inputs, targets = synthetic(args.examples)
    batches = list(zip(inputs.split(args.batch_size), targets.split(args.batch_size), strict=True))
    problem = Problem(model, nn.CrossEntropyLoss(), batches, {})
    size = sum(p.numel() for p in model.parameters())
    gradient(problem)
    g = min(seconds_of(gradient, problem) for _ in range(2))
    lines = ["# What the solver itself costs", "", *machine(("losslab", "torch"))]
    lines += [f"- {args.network} of {size:,} parameters as it is initialised, {args.examples} examples in batches of"
              f" {args.batch_size}, k = {args.k}; one gradient {g:.2f} s"]  # fmt: skip
    for name in args.solvers:
        rows, summary = measure(name, problem, args.k)
        lines += [summary, "", *markdown(["part", "seconds", "of all", "calls"], rows), ""]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
