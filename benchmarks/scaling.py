"""How cost grows with parameters, examples, eigenpairs and processes, and the slopes in log–log coordinates.

    python benchmarks/scaling.py --output benchmarks/results/scaling.md          # 10 to 15 minutes on two cores
    python benchmarks/scaling.py --quick                                         # 2 minutes

Every point is a fresh process (this script with `--point JSON`) with one thread; several processes are started by
torchrun and sum with gloo. Networks are as they are initialised, inputs are random: only sizes matter here.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fresh_process import in_a_fresh_process, peak_bytes, seconds_of
from problem import Problem, gradient
from scipy.stats import linregress
from table import machine, markdown, publish, spread
from torch import nn

from losslab import Hessian, Ranks, eigenpairs

INPUTS, CLASSES = 64, 10
STEPS = 20  # of Lanczos, where runs of different sizes are compared: one that stops by itself takes now more, now less
SMALL = 20_000  # parameters, where the number of examples varies
Point = dict[str, Any]


# -- in a process of its own ------------------------------------------------------------------------------


def network(parameters: int) -> nn.Module:
    """64-w-w-10 with tanh, of about so many parameters."""
    width = max(round(((INPUTS + CLASSES + 2) ** 2 / 4 + parameters) ** 0.5 - (INPUTS + CLASSES + 2) / 2), 1)
    torch.manual_seed(0)
    hidden = [nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def make(point: Point, ranks: Ranks) -> Problem:
    """The network, and this process's share of the batches."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(point["examples"], INPUTS, generator=generator)
    targets = torch.randint(CLASSES, (point["examples"],), generator=generator)
    size = min(point["batch_size"], -(-point["examples"] // ranks.count))
    batches = list(zip(inputs.split(size), targets.split(size), strict=True))
    return Problem(network(point["parameters"]), nn.CrossEntropyLoss(), batches[ranks.rank :: ranks.count], {})


def measure(point: Point) -> dict[str, Any]:
    """Seconds of a gradient, a product and a whole run; the memory that this process took beyond its imports."""
    torch.set_num_threads(1)
    imports = peak_bytes()
    with Ranks.joined() as ranks:
        return measure_together(make(point, ranks), point, ranks) | {"memory": peak_bytes() - imports}


def measure_together(problem: Problem, point: Point, ranks: Ranks) -> dict[str, Any]:
    """What `measure` does once all processes are there."""
    hessian = Hessian(problem.risk(check=False, ranks=ranks))
    vector = torch.randn(hessian.size, 1, generator=torch.Generator().manual_seed(2))
    hessian.matmat(vector)
    products = [seconds_of(hessian.matmat, vector) for _ in range(repeats(hessian, vector, ranks))]
    began = time.perf_counter()
    fixed = {"tol": 1e-15, "max_matvecs": STEPS, "max_basis": STEPS + 2} if point["fixed"] else {}
    found = eigenpairs(hessian, point["k"], vectors=False, **fixed)
    seconds = time.perf_counter() - began
    gradient(problem)
    result = {"parameters": hessian.size, "g": seconds_of(gradient, problem), "products": products, "run": seconds}
    return result | {"matvecs": found.matvecs, "rank": ranks.rank}


def repeats(hessian: Hessian, vector: torch.Tensor, ranks: Ranks) -> int:
    """As many products as take about two seconds, 3 to 50; all processes must make the same number."""
    seconds = ranks.total(seconds_of(hessian.matmat, vector))[0] / ranks.count
    return int(min(max(2 / seconds, 3), 50))


# -- the points and what they say together ----------------------------------------------------------------


def point(parameters: int = 100_000, examples: int = 256, k: int = 3, processes: int = 1, **others: Any) -> Point:
    defaults = {"parameters": parameters, "examples": examples, "k": k, "processes": processes}
    return defaults | {"fixed": True, "batch_size": 1000} | others


def decades(low: float, high: float, each: int) -> list[int]:
    """Numbers from low to high, so many a decade, evenly spaced by their logarithms."""
    count = round(np.log10(high / low) * each) + 1
    return [int(float(f"{value:.2g}")) for value in np.geomspace(low, high, count)]


def series(quick: bool) -> dict[str, tuple[str, list[Point]]]:
    """Title -> what varies, and the points."""
    largest, most = (3e6, 1e4) if quick else (5e7, 5e4)
    ks = [1, 4, 16] if quick else [1, 2, 5, 10, 20, 50]
    each = 1 if quick else 2
    shared = {"examples": 2048 if quick else 20_000, "batch_size": 1024 if quick else 2000, "parameters": 300_000}
    return {
        "parameters": ("parameters", [point(parameters=p) for p in decades(1e4, largest, each)]),
        "examples": ("examples", [point(SMALL, examples=n) for n in decades(100, most, each)]),
        "eigenpairs": ("k", [point(SMALL, examples=1000, k=k, fixed=False) for k in ks]),
        "processes": ("processes", [point(**shared, processes=n) for n in (1, 2)]),
    }


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> str:
    """d log(seconds) / d log(size) by least squares, ± its standard error."""
    if len(sizes) < 3:
        return "–"
    fit = linregress(np.log(sizes), np.log(seconds))
    return f"{fit.slope:.2f} ± {fit.stderr:.2f}"


def slopes(name: str, varied: list[float], results: list[dict[str, Any]]) -> list[str]:
    """Lines of a list: slopes over all points, and over the upper two decades, where fixed costs no longer bend it."""
    costs = {
        "a product": [statistics.median(result["products"]) for result in results],
        f"{STEPS} Lanczos steps": [result["run"] for result in results],
        "memory": [result["memory"] for result in results],
    }
    above = sum(size < varied[-1] / 100 for size in varied)  # the sizes ascend
    lines = []
    for cost, values in costs.items():
        every, upper = slope(varied, values), slope(varied[above:], values[above:])
        lines.append(f"- {cost} ∝ {name}^s: s = {every} over all, {upper} over the upper two decades")
    return lines


def section(title: str, varied: str, points: list[Point]) -> list[str]:
    """The measured points as a table, and their slopes or speed-up."""
    header = [varied, "g, ms", "a product, ms", "products", "run, s", "memory, GiB"]
    sizes, rows, results, failures = [], [], [], []
    for asked in points:
        result = fresh(asked)
        if "failure" in result:
            failures.append(f"- {varied} {asked[varied]:,}: {result['failure']}")
            continue
        sizes.append(result["parameters"] if varied == "parameters" else asked[varied])
        product = spread([seconds * 1e3 for seconds in result["products"]], ".1f")
        cells = [f"{result['g'] * 1e3:.1f}", product, str(result["matvecs"]), f"{result['run']:.2f}"]
        rows.append([f"{sizes[-1]:,}", *cells, f"{result['memory'] / 2**30:.2f}"])
        results.append(result)
    lines = ["", f"## {title}", "", *markdown(header, rows), "", *failures]
    if varied in ("parameters", "examples"):
        return lines + slopes(varied, sizes, results)
    if varied == "processes" and len(results) == 2:
        one, two = (statistics.median(result["products"]) for result in results)
        run = results[0]["run"] / results[1]["run"]
        return [*lines, f"- two processes: a product {one / two:.2f} × as fast, a run {run:.2f} × as fast"]
    return lines


def fresh(asked: Point) -> dict[str, Any]:
    """The point in a process of its own, or in several."""
    print(f"{asked} …", file=sys.stderr)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={asked['processes']}"]
    several = launcher if asked["processes"] > 1 else []
    return in_a_fresh_process(__file__, [f"--point={json.dumps(asked)}"], timeout=1800, launcher=several)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller points")
    parser.add_argument("--only", nargs="+", choices=list(series(True)), default=list(series(True)))
    parser.add_argument("--output", type=Path, help="file to write the tables to, as well")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        result = measure(args.point)
        if result["rank"] == 0:
            print(json.dumps(result))
        return
    os.environ |= {"OMP_NUM_THREADS": "1"}
    lines = ["# How cost grows", "", *machine(("losslab", "torch"))]
    lines += ["- one thread a process; a fresh process for each row; products: median (smallest–largest)"]
    for title, (varied, points) in series(args.quick).items():
        if title in args.only:
            lines += section(title, varied, points)
    publish(lines, args.output)


if __name__ == "__main__":
    main()
