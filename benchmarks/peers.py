"""The five outermost Hessian eigenvalues of a trained network: losslab beside other packages.

    python benchmarks/peers.py --data FOLDER --output benchmarks/results/peers.md

Every measurement runs in a fresh process (this script with `--run NAME`), all with the same network, weights
and images; `--repeats` rounds go through the methods there and back. Without `--data` images are synthetic.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from typing import Any

import peer_methods as peers
import torch
from fresh_process import counted, in_a_fresh_process, in_rounds, peak_bytes, seconds_of
from peer_methods import METHODS, Method
from problem import Problem, gradient, load, parser, problem_lines
from table import machine, markdown, publish, spread

from losslab import GaussNewton, Hessian

PACKAGES = ("losslab", "torch", "scipy", "hessian-eigenthings", "curvlinops-for-pytorch", "pyhessian")


# -- in a process of its own ------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Train the network and find what the other processes need to know; kept in the cache for later runs."""
    problem, file = load(args)
    known = problem.known
    if "reference" not in known:
        values = peers.by_losslab(problem.double(), 0, tol=1e-8)
        known["reference"] = sorted(map(float, values), key=abs, reverse=True)
    if args.check_reference:
        values = peers.by_curvlinops(problem.double(), 0, tol=1e-10)
        known["difference"] = peers.worst_error(values, known["reference"])
    if "hessian-eigenthings" in args.methods and importlib.util.find_spec("hessian_eigenthings"):
        seeds = range(len(known.setdefault("steps", [])), args.repeats)
        known["steps"] += [peers.steps_needed(problem, seed) for seed in seeds]
    file.write_text(json.dumps(known))
    return known | problem.facts()


def measure(method: Method, problem: Problem, seed: int) -> dict[str, Any]:
    """Time, products, accuracy and memory of one method; the unit g is taken before and after it."""
    count = counted(method.product.call, method.product.vectors)
    method.first()
    units = [seconds_of(gradient, problem) for _ in range(4)][1:]  # the first call of a kernel prepares it
    began = time.perf_counter()
    values = [float(value) for value in method.solve(problem, seed)]
    seconds = time.perf_counter() - began
    products, peak = count[0], peak_bytes()
    g = statistics.median(units + [seconds_of(gradient, problem) for _ in range(3)])
    cost = seconds / products / g
    result = {"seconds": seconds, "products": products, "g": g, "cost": cost, "peak": peak, "values": values}
    return result | {"error": peers.worst_error(values, problem.known["reference"])}


def product_costs(problem: Problem) -> dict[str, dict[str, list[float]]]:
    """Units g for each vector, in blocks of 1 and of 8, with graphs kept (already built) and streamed."""
    operators = {}
    for kind, name in ((Hessian, "Hessian"), (GaussNewton, "Gauss–Newton")):
        for memory in ("auto", 0):
            operator = kind(problem.risk(graph_memory=memory))
            vectors = torch.randn(operator.size, 8, generator=torch.Generator().manual_seed(0))
            operator.matmat(vectors[:, :1])
            kept = f"graphs of {operator.num_kept} of {len(problem.batches)} batches kept"
            operators[f"{name}, {'streamed' if memory == 0 else kept}"] = operator
    costs: dict[str, dict[str, list[float]]] = {name: {"1": [], "8": []} for name in operators}
    for _ in range(5):
        g = seconds_of(gradient, problem)
        for name, operator in operators.items():
            for block, found in costs[name].items():
                found.append(seconds_of(operator.matmat, vectors[:, : int(block)]) / int(block) / g)
    return costs


# -- what all of them found -------------------------------------------------------------------------------


def methods_table(rounds: list[dict[str, dict[str, Any]]]) -> list[str]:
    header = ["method", "seconds", "× losslab", "products", "g, seconds", "g a product", "worst error", "peak GiB"]
    rows = []
    for name in rounds[0]:
        results = [found[name] for found in rounds]
        failures = [result["failure"] for result in results if "failure" in result]
        if failures:
            failure = f"failed {len(failures)} of {len(rounds)} times: {failures[0]}"
            rows.append([METHODS[name].label, failure, *["–"] * (len(header) - 2)])
            continue
        bases = [found["losslab"]["seconds"] for found in rounds if "seconds" in found.get("losslab", {})]
        ratios = [result["seconds"] / base for result, base in zip(results, bases, strict=False)]
        columns = {"seconds": ".1f", "products": ".0f", "g": ".3f", "cost": ".2f"}
        cells = [spread([result[key] for result in results], form) for key, form in columns.items()]
        cells.insert(1, spread(ratios, ".2f") if len(ratios) == len(rounds) else "–")
        error = max(result["error"] for result in results)
        peak = spread([result["peak"] / 2**30 for result in results], ".2f")
        rows.append([METHODS[name].label, *cells, f"{error:.0e}", peak])
    return markdown(header, rows)


def costs_table(costs: dict[str, Any]) -> list[str]:
    if "failure" in costs:
        return [f"product costs: {costs['failure']}"]
    rows = [[name, *(spread(found, ".2f") for found in blocks.values())] for name, blocks in costs.items()]
    return markdown(["losslab, g a product", "1 vector", "8 vectors, each"], rows)


def heading(args: argparse.Namespace, facts: dict[str, Any]) -> list[str]:
    values = ", ".join(f"{value:.5g}" for value in facts["reference"])
    lines = problem_lines(args, facts)
    lines += [f"- asked for: the {peers.K} eigenvalues of largest magnitude to {peers.TOL:g}; in float64 {values}"]
    if "difference" in facts:
        lines.append(f"- in float64 curvlinops and ARPACK differ from that by {facts['difference']:.0e}")
    return lines


# -- the rounds -------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    made = parser(__doc__, list(METHODS), default=list(METHODS), runs=["prepare", "costs"])
    made.add_argument("--check-reference", action="store_true", help="compare with curvlinops in float64")
    return made.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The one thing that this process was started for."""
    if args.run == "prepare":
        return prepare(args)
    problem, _ = load(args)
    return product_costs(problem) if args.run == "costs" else measure(METHODS[args.run], problem, args.seed)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.run:
        print(json.dumps(run(args)))
        return

    def fresh(name: str, seed: int = 0) -> dict[str, Any]:
        print(f"{name}, seed {seed} …", file=sys.stderr)
        command = [*sys.argv[1:], f"--run={name}", f"--seed={seed}"]
        return in_a_fresh_process(__file__, command, args.timeout)

    lines = ["# The outermost Hessian eigenvalues: losslab and others", "", *machine(PACKAGES)]
    facts = fresh("prepare")
    if "failure" in facts:
        raise SystemExit(f"prepare: {facts['failure']}")
    rounds = in_rounds(fresh, args.methods, args.repeats)
    lines += [*heading(args, facts), "", *methods_table(rounds), "", *costs_table(fresh("costs"))]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
