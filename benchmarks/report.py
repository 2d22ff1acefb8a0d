"""The whole spectrum report of a trained network: both ends, density and trace, by losslab and by other packages.

    python benchmarks/report.py --data FOLDER --output benchmarks/results/report.md

Every measurement runs in a fresh process (this script with `--run NAME`), all with the same network, weights
and images; `--repeats` rounds go through the methods there and back. Without `--data` images are synthetic.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from fresh_process import counted, in_a_fresh_process, in_rounds, limit_memory, peak_bytes, seconds_of
from peer_methods import TOL, worst_error
from peers import PACKAGES
from problem import Problem, gradient, load, parser, problem_lines
from reference import K, density_error, reference, told
from report_methods import ANSWERS, METHODS, NODES, Method
from table import machine, markdown, publish, spread

COLUMNS = {"seconds": ".1f", "g": ".3f", "cost": ".2f"}
USUAL = [name for name in METHODS if not name.endswith("defaults")]


# -- in a process of its own ------------------------------------------------------------------------------


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Train the network, find the float64 reference and what packages are told; kept in the cache for later runs."""
    problem, file = load(args, "report")
    known = problem.known
    if known.get("num_probes") != args.reference_probes or len(known["nodes"]) < args.reference_nodes:
        known |= reference(problem, args.reference_probes, args.reference_nodes)
        file.write_text(json.dumps(known))
    known |= told(problem, args.methods, args.repeats)
    file.write_text(json.dumps(known))
    return known | problem.facts()


def measure(method: Method, problem: Problem, seed: int) -> dict[str, Any]:
    """Time, products, memory and errors of one method; the unit g is taken before and after it."""
    count = counted(method.product.call, method.product.vectors)
    units = [seconds_of(gradient, problem) for _ in range(4)][1:]  # the first call of a kernel prepares it
    answers: dict[str, Any] = {}
    products: dict[str, int] = {}
    failures: dict[str, str] = {}
    began = time.perf_counter()
    made = method.make(problem)
    seconds, making = time.perf_counter() - began, count[0]
    for name, call in method.calls.items():
        before, began = count[0], time.perf_counter()
        try:
            answers |= call(made, problem.known, seed, answers)
        except Exception as error:  # what fails is said in the table and not timed
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        seconds += time.perf_counter() - began
        products[name] = answers.pop("matvecs", count[0] - before)
    peak = peak_bytes()
    g = statistics.median(units + [seconds_of(gradient, problem) for _ in range(3)])
    cost = seconds / (making + sum(products.values())) / g
    found = {"seconds": seconds, "making": making, "products": products, "failures": failures, "g": g, "cost": cost}
    return found | {"peak": peak, "errors": errors(answers, problem.known), "status": answers.get("status", "")}


def errors(answers: dict[str, Any], known: dict[str, Any]) -> dict[str, float]:
    """Each answer's error, in the units that the table names."""
    found = {}
    for end in ("top", "smallest"):
        if end in answers:
            found[end] = worst_error([float(value) for value in answers[end]], known[end])
    if "density" in answers:
        nodes, weights = (np.asarray(part, dtype=float) for part in answers["density"])
        found["density"] = density_error((nodes, weights), (np.array(known["nodes"]), np.array(known["weights"])))
    if "trace" in answers:
        found["trace"] = abs(answers["trace"] / known["trace"] - 1)
    return found


# -- what all of them found -------------------------------------------------------------------------------


def costs_table(rounds: list[dict[str, dict[str, Any]]]) -> list[str]:
    rows = []
    for name in rounds[0]:
        results = [found[name] for found in rounds]
        broken = [result["failure"] for result in results if "failure" in result]
        if broken:
            rows.append([METHODS[name].label, f"failed {len(broken)} of {len(rounds)} times: {broken[0]}", *"––––––"])
            continue
        bases = [found["losslab"]["seconds"] for found in rounds if "seconds" in found.get("losslab", {})]
        ratios = [result["seconds"] / base for result, base in zip(results, bases, strict=False)]
        missing = [answer for answer in ANSWERS if answer not in results[0]["errors"]]
        label = METHODS[name].label + (f", without {' and '.join(missing)}" if missing else "")
        statuses = sorted({result["status"] for result in results} - {""})
        label += f" ({', '.join(statuses)})" if statuses else ""
        seconds, g, cost = (spread([r[key] for r in results], form) for key, form in COLUMNS.items())
        ratio = spread(ratios, ".2f") if len(ratios) == len(rounds) else "–"
        peak = spread([result["peak"] / 2**30 for result in results], ".2f")
        rows.append([label, seconds, ratio, *products_of(results), g, cost, peak])
    header = ["method", "seconds", "× losslab", "products", "for", "g, seconds", "g a product", "peak GiB"]
    return markdown(header, rows)


def products_of(results: list[dict[str, Any]]) -> tuple[str, str]:
    """How many in all, and for which call how many."""
    every = [sum(result["products"].values()) + result["making"] for result in results]
    calls: Iterable[str] = results[0]["products"]
    parts = [f"{call} {spread([result['products'].get(call, 0) for result in results], '.0f')}" for call in calls]
    return spread(every, ".0f"), ", ".join(parts)


def errors_table(rounds: list[dict[str, dict[str, Any]]]) -> list[str]:
    """The largest error of each answer over the rounds, or how its call failed."""
    rows = []
    for name, method in METHODS.items():
        results = [found[name] for found in rounds if "errors" in found.get(name, {})]
        if not results:
            continue
        failures = {call: text for result in results for call, text in result["failures"].items()}
        rows.append([method.label, *(error_cell(answer, results, failures) for answer in ANSWERS)])
    return markdown(["largest error", *ANSWERS], rows)


def error_cell(answer: str, results: list[dict[str, Any]], failures: dict[str, str]) -> str:
    seen = [result["errors"][answer] for result in results if answer in result["errors"]]
    if seen:
        return f"{max(seen):.1e}"
    return next((f"fails: {failures[call]}" for call in (answer, "ends") if call in failures), "none")


def heading(args: argparse.Namespace, facts: dict[str, Any]) -> list[str]:
    top, smallest = (", ".join(f"{value:.5g}" for value in facts[end]) for end in ("top", "smallest"))
    return [
        *problem_lines(args, facts),
        f"- asked for: the {K} largest and the {K} smallest eigenvalues to {TOL:g}, the density with {NODES} nodes of"
        " one probe, the trace to 1 %",
        f"- in float64: largest {top}; smallest {smallest}; trace {facts['trace']:.5g}, exact",
        f"- density: Wasserstein-1 distance from a float64 reference of {facts['num_probes']} probes with"
        f" {len(facts['nodes']) // facts['num_probes']} nodes each, in units of the mean |eigenvalue| (so that a spike"
        f" at zero has error 1); one probe of the reference differs from the others by {facts['one_probe']:.1e}",
        "- errors of eigenvalues and trace are relative; the worst eigenvalue, the worst round",
        f"- told: hessian-eigenthings {facts.get('steps', '–')} steps for top and smallest by round and"
        f" {facts.get('hutch++', '–')} products for the trace; curvlinops {facts.get('xtrace', '–')} for the trace",
    ]


# -- the rounds -------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    made = parser(__doc__, list(METHODS), default=USUAL, runs=["prepare"])
    made.add_argument("--reference-probes", type=int, default=5, help="start vectors of the float64 density")
    made.add_argument("--reference-nodes", type=int, default=150, help="Lanczos steps for each")
    return made.parse_args()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The one thing that this process was started for."""
    limit_memory()
    if args.run == "prepare":
        return prepare(args)
    problem, _ = load(args, "report")
    return measure(METHODS[args.run], problem, args.seed)


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

    lines = ["# The whole spectrum report: losslab and others", "", *machine(PACKAGES)]
    facts = fresh("prepare")
    if "failure" in facts:
        raise SystemExit(f"prepare: {facts['failure']}")
    rounds = in_rounds(fresh, args.methods, args.repeats)
    lines += [*heading(args, facts), "", *costs_table(rounds), "", *errors_table(rounds)]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
