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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peer_methods as peers
import torch
from data import CACHE, images, in_batches, name_of, trained_cnn
from peer_methods import METHODS, Method, Problem
from processes import in_a_fresh_process, peak_bytes
from table import machine, markdown, spread
from torch import Tensor, nn

from losslab import EmpiricalRisk, Hessian

PACKAGES = ("losslab", "torch", "scipy", "hessian-eigenthings", "curvlinops-for-pytorch", "pyhessian")


# -- in a process of its own ------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> tuple[Problem, Path]:
    """The problem, and the file of what is known about it."""
    settings = {"width": args.width, "examples": args.train_examples, "epochs": args.epochs}
    model, key = trained_cnn(args.data, **settings, cache=args.cache)
    file = args.cache / f"{name_of(key, args.examples, args.batch_size)}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    batches = in_batches(*images(args.data, args.examples), args.batch_size)
    return Problem(model, nn.CrossEntropyLoss(), batches, known), file


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Train the network and find what the other processes need to know; kept in the cache for later runs."""
    problem, file = load(args)
    known = problem.known
    if "reference" not in known:
        values = peers.by_losslab(problem.double(), 0, tol=1e-8)
        known["reference"] = sorted(map(float, values), key=abs, reverse=True)
    if args.check_reference:
        known["difference"] = problem.error(peers.by_curvlinops(problem.double(), 0, tol=1e-10))
    if "hessian-eigenthings" in args.methods and importlib.util.find_spec("hessian_eigenthings"):
        seeds = range(len(known.setdefault("steps", [])), args.repeats)
        known["steps"] += [peers.steps_needed(problem, seed) for seed in seeds]
    file.write_text(json.dumps(known))
    risk = EmpiricalRisk(problem.model, problem.loss_fn, problem.batches)
    return known | {"loss": risk.loss(), "num_parameters": risk.space.size}


def measure(method: Method, problem: Problem, seed: int) -> dict[str, Any]:
    """Time, products, accuracy and memory of one method; the unit g is taken before and after it."""
    count = peers.counted(method.product)
    method.first()
    units = [seconds_of(gradient, problem) for _ in range(4)][1:]  # the first call of a kernel prepares it
    began = time.perf_counter()
    values = [float(value) for value in method.solve(problem, seed)]
    seconds = time.perf_counter() - began
    products, peak = count[0], peak_bytes()
    g = statistics.median(units + [seconds_of(gradient, problem) for _ in range(3)])
    cost = seconds / products / g
    result = {"seconds": seconds, "products": products, "g": g, "cost": cost, "peak": peak, "values": values}
    return result | {"error": problem.error(values)}


def product_costs(problem: Problem) -> dict[str, dict[str, list[float]]]:
    """Units g for each vector, in blocks of 1 and of 8, with graphs kept (already built) and streamed."""
    operators = {}
    for memory in ("auto", 0):
        hessian = Hessian(EmpiricalRisk(problem.model, problem.loss_fn, problem.batches, graph_memory=memory))
        vectors = torch.randn(hessian.size, 8, generator=torch.Generator().manual_seed(0))
        hessian.matmat(vectors[:, :1])
        kept = f"graphs of {hessian.num_kept} of {len(problem.batches)} batches kept"
        operators["streamed" if memory == 0 else kept] = hessian
    costs: dict[str, dict[str, list[float]]] = {name: {"1": [], "8": []} for name in operators}
    for _ in range(5):
        g = seconds_of(gradient, problem)
        for name, hessian in operators.items():
            for block, found in costs[name].items():
                found.append(seconds_of(hessian.matmat, vectors[:, : int(block)]) / int(block) / g)
    return costs


def gradient(problem: Problem) -> list[Tensor]:
    """One gradient over the data, in a plain loop over the batches: the unit g."""
    parameters, examples = list(problem.model.parameters()), sum(len(y) for _, y in problem.batches)
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in problem.batches:
        loss = problem.loss_fn(problem.model(x), y) * (len(y) / examples)
        for whole, part in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            whole.add_(part)
    return total


def seconds_of(function: Callable[[Any], object], argument: Any) -> float:
    began = time.perf_counter()
    function(argument)
    return time.perf_counter() - began


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


def problem_lines(args: argparse.Namespace, facts: dict[str, Any]) -> list[str]:
    source = "CIFAR-10" if args.data else "synthetic CIFAR-10-shaped"
    values = ", ".join(f"{value:.5g}" for value in facts["reference"])
    lines = [
        f"- data: {args.examples} {source} images in batches of {args.batch_size}",
        f"- network: SimpleCNN, {facts['num_parameters']:,} parameters, after {args.epochs} epochs on"
        f" {args.train_examples} images; loss on the data {facts['loss']:.3f}",
        f"- asked for: the {peers.K} eigenvalues of largest magnitude to {peers.TOL:g}; in float64 {values}",
        f"- {args.repeats} rounds, a fresh process for each measurement: median (smallest–largest)",
        "- g: one gradient on the same data in the same process",
    ]
    if "difference" in facts:
        lines.append(f"- in float64 curvlinops and ARPACK differ from that by {facts['difference']:.0e}")
    return lines


# -- the rounds -------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add, names = parser.add_argument, list(METHODS)
    add("--data", type=Path, help="folder with cifar10.npz; without it synthetic images")
    add("--examples", type=int, default=500)
    add("--batch-size", type=int, default=125, help="the last batch may be smaller")
    add("--width", type=int, default=64, help="of the network; 64 gives 183,754 parameters")
    add("--train-examples", type=int, default=5000)
    add("--epochs", type=int, default=10)
    add("--repeats", type=int, default=3, help="rounds; a round's number is the random seed")
    add("--methods", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--threads", type=int, default=torch.get_num_threads())
    add("--timeout", type=float, default=3600, help="seconds that one measurement may take")
    add("--check-reference", action="store_true", help="compare float64 values with curvlinops and ARPACK")
    add("--cache", type=Path, default=CACHE, help="folder for trained weights and float64 values")
    add("--output", type=Path, help="file to write the tables to, as well")
    add("--run", choices=["prepare", "costs", *names], help=argparse.SUPPRESS)
    add("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


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
    rounds = []
    for seed in range(args.repeats):
        order = args.methods[::-1] if seed % 2 else args.methods
        found = {name: fresh(name, seed) for name in order}
        rounds.append({name: found[name] for name in args.methods})
    lines += [*problem_lines(args, facts), "", *methods_table(rounds), "", *costs_table(fresh("costs")), ""]
    print("\n".join(lines))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
