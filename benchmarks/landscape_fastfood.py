"""A product with a random projection: Fastfood beside a dense matrix and a sparse one.

    python benchmarks/landscape_fastfood.py --output benchmarks/results/landscape_fastfood.md

Dense projections are held in float32, as (d, P) rows, which both products read from front to back; where one does not
fit half of the free memory its row says so. A time is the smallest of the repeats of a round; a cell is the median over
rounds (smallest–largest).
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from table import machine, markdown, publish, spread
from torch import Tensor, nn

from losslab.params import ParameterSpace
from losslab.probes.subspaces.subspaces import Subspace, random_subspace

KINDS = ("fastfood", "dense", "sparse")


def space_of(size: int) -> ParameterSpace:
    """One weight matrix and its bias, `size` numbers in all."""
    rows = max(int(size**0.5), 1)
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(rows, size // rows - 1))
    module.bias = nn.Parameter(torch.zeros(size - rows * (size // rows - 1)))
    return ParameterSpace(module)


def fastfood(
    size: int = 1_000_000, dimensions: Sequence[int] = (100, 500, 1000, 10_000), rounds: int = 3, repeats: int = 5
) -> list[str]:
    """The section's lines: time of P v and of Pᵀ g, memory, and how many times slower the others are."""
    space, rows = space_of(size), []
    for dimension in dimensions:
        base: dict[str, float] = {}
        for kind in KINDS:
            try:
                subspace = random_subspace(kind, space, dimension)
            except ValueError as refusal:
                rows.append([f"{dimension:,}", kind, *["–"] * 3, str(refusal).split("with ")[-1].split(";")[0]])
                continue
            v, g = torch.ones(dimension), torch.ones(size)
            forward = milliseconds(lambda: subspace.matvec(v), rounds, repeats)  # noqa: B023  # called here
            backward = milliseconds(lambda: subspace.rmatvec(g), rounds, repeats)  # noqa: B023
            both = [a + b for a, b in zip(forward, backward, strict=True)]
            base.setdefault("both", statistics.median(both))
            times = spread([each / base["both"] for each in both], ".1f")
            cells = [spread(forward, ".1f"), spread(backward, ".1f"), f"{held(subspace) / 1e6:,.0f}", times]
            rows.append([f"{dimension:,}", kind, *cells])
    header = ["d", "projection", "P v, ms", "Pᵀ g, ms", "held, MB", "× fastfood"]
    return [f"P = {size:,} parameters, float32, {torch.get_num_threads()} threads.", "", *markdown(header, rows)]


def milliseconds(product: Callable[[], Tensor], rounds: int, repeats: int) -> list[float]:
    """The smallest time in each round; one product before them is not counted."""
    product()
    found = []
    for _ in range(rounds):
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            product()
            times.append(time.perf_counter() - began)
        found.append(1e3 * min(times))
    return found


def held(subspace: Subspace) -> int:
    """Bytes of the tensors that a projection keeps."""
    return sum(tensor.nbytes for tensor in vars(subspace).values() if isinstance(tensor, Tensor))


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, nargs="+", default=[100, 500, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lines = fastfood(args.size, args.dimensions, args.rounds, args.repeats)
    publish(["# Fastfood", "", *machine(["torch"]), "", *lines], args.output)


if __name__ == "__main__":
    main()
