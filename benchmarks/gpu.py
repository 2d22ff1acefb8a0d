"""One curvature-vector product on a GPU, by each way of computing it, in units of one gradient.

    python benchmarks/gpu.py --output benchmarks/results/gpu.md         # on a machine with CUDA
    python benchmarks/gpu.py --smoke                                    # tiny and on the CPU: does the script work?

Every way runs in a fresh process (this script with `--run WAY`), and its product is compared with the eager one before
it is timed, for two vectors of which the second comes after everything is compiled or captured: a compiled linearised
function once returned products that were 30 % off.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fresh_process import in_a_fresh_process
from gpu_models import Case, cases
from table import machine, markdown, publish, spread
from torch import Tensor
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab import EmpiricalRisk, GaussNewton, Hessian
from losslab.operators.gradient_graph import GradientGraph

Product = Callable[[Tensor], Tensor]
MOST_DIFFERENCE = 1e-3  # relative, in float32 without TF32: rounding of these networks stays below it


def make_risk(case: Case, graph_memory: int | str = "auto") -> EmpiricalRisk:
    return EmpiricalRisk(case.model, case.loss_fn, [case.batch], check=False, graph_memory=graph_memory)  # type: ignore


def kept(case: Case) -> Product:
    """losslab's Hessian with its graph kept."""
    return Hessian(make_risk(case)).__matmul__


def streamed(case: Case) -> Product:
    """losslab's Hessian, its graph rebuilt for each product."""
    return Hessian(make_risk(case, 0)).__matmul__


def gauss_newton(case: Case) -> Product:
    """losslab's Gauss–Newton matrix with its graphs kept: another matrix, so compared with itself streamed."""
    return GaussNewton(make_risk(case)).__matmul__


def autograd(case: Case) -> Product:
    """The gradient's graph kept, with autograd's own double backward."""
    parameters, space = list(case.model.parameters()), make_risk(case).space
    with sdpa_kernel(SDPBackend.MATH):
        loss = case.loss_fn(case.model(case.batch[0]), case.batch[1])
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        found = torch.autograd.grad(gradients, parameters, grad_outputs=space.views(vector), retain_graph=True)
        return space.flatten(found)

    return product


def functional(case: Case) -> Product:
    """`torch.func.jvp` of the gradient: nothing kept."""
    space = make_risk(case).space
    point = {name: parameter.detach() for name, parameter in case.model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return case.loss_fn(functional_call(case.model, parameters, (case.batch[0],)), case.batch[1])

    def product(vector: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return space.flatten(list(jvp(grad(loss), (point,), (space.named_views(vector),))[1].values()))

    return product


def captured(case: Case) -> Product:
    """losslab's kept graph, its product recorded once as a CUDA graph and replayed."""
    risk = make_risk(case)
    rows = torch.zeros(1, risk.space.size, device=risk.device)
    out, stream = torch.zeros_like(rows), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the backward pass runs on the stream of its forward pass
        graph = GradientGraph(risk, risk.leaves(risk.space.vector()), case.batch, len(case.batch[0]))
        for _ in range(3):
            graph.add_products(rows, out)
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded, stream=stream):
        out.zero_()
        graph.add_products(rows, out)

    def product(vector: Tensor) -> Tensor:
        rows.copy_(vector.unsqueeze(0))
        recorded.replay()
        return out[0].clone()

    product.graph = graph  # type: ignore[attr-defined]  # the recording reads its tensors
    return product


# Label and how to build a product. On the CPU "eager" traces as the real compiler does, but compiles nothing.
SMOKE = {"backend": "eager"}
WAYS: dict[str, tuple[str, Callable[[Case, bool], Product]]] = {
    "kept": ("losslab, graph kept", lambda case, _: kept(case)),
    "streamed": ("losslab, streamed", lambda case, _: streamed(case)),
    "gauss-newton": ("losslab, Gauss–Newton, graphs kept", lambda case, _: gauss_newton(case)),
    "autograd": ("graph kept, autograd's double backward", lambda case, _: autograd(case)),
    "functional": ("torch.func.jvp of the gradient", lambda case, _: functional(case)),
    "compiled": (
        "the same, torch.compile",
        lambda case, smoke: torch.compile(functional(case), **(SMOKE if smoke else {})),
    ),
    "compiled-graphs": (
        "the same, torch.compile with CUDA graphs",
        lambda case, smoke: torch.compile(functional(case), **(SMOKE if smoke else {"mode": "reduce-overhead"})),
    ),
    "captured": ("losslab, graph kept, as a CUDA graph", lambda case, _: captured(case)),
}


# -- in a process of its own ------------------------------------------------------------------------------


def measure(case: Case, way: str, smoke: bool, rounds: int) -> dict[str, Any]:
    """What building it costs, its products in gradients beside them, its memory, and its difference."""
    parameters = list(case.model.parameters())
    size, device = sum(p.numel() for p in parameters), parameters[0].device
    vectors = torch.randn(2, size, generator=torch.Generator().manual_seed(0)).to(device)

    def gradient() -> object:
        return torch.autograd.grad(case.loss_fn(case.model(case.batch[0]), case.batch[1]), parameters)

    timed(gradient)
    peaks = {"gradient_peak": peak_of(gradient, device)}
    kind = GaussNewton if way == "gauss-newton" else Hessian
    expected = [kind(make_risk(case, 0)) @ vector for vector in vectors]
    began = time.perf_counter()
    product = WAYS[way][1](case, smoke)
    got = [product(vector) for vector in vectors]
    synchronize()
    building = time.perf_counter() - began
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True))
    if not difference <= MOST_DIFFERENCE:
        return {"failure": f"wrong: {difference:.0e} off"}
    pairs = [(timed(gradient), timed(lambda: product(vectors[0]))) for _ in range(rounds)]
    peaks["peak"] = peak_of(lambda: product(vectors[0]), device)
    title = f"{case.name}, {size:,} parameters"
    return peaks | {"title": title, "building": building, "difference": difference, "pairs": pairs}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call, the device's work included."""
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def peak_of(function: Callable[[], object], device: torch.device) -> float:
    """Bytes on the device at most during a call, with all that is kept for it; NaN on the CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    function()
    synchronize()
    return torch.cuda.max_memory_allocated()


# -- what all of them found -------------------------------------------------------------------------------


def table(network: str, results: dict[str, dict[str, Any]]) -> list[str]:
    """A row for each way, and the gradient that all are measured in."""
    rows, units, peaks, title = [], [], [], network
    for way, result in results.items():
        if "failure" in result:
            rows.append([WAYS[way][0], "", f"failed: {result['failure'][:150]}", "", ""])
            continue
        seconds = [g for g, _ in result["pairs"]]
        units, peaks, title = units + seconds, [*peaks, result["gradient_peak"]], result["title"]
        cost = spread([product / g for g, product in result["pairs"]], ".2f")
        build = f"{result['building'] / statistics.median(seconds):.0f}"
        rows.append([WAYS[way][0], build, cost, gib(result["peak"]), f"{result['difference']:.0e}"])
    if units:
        unit = spread([g * 1e3 for g in units], ".1f")
        rows.insert(0, ["one gradient", "", f"1 = {unit} ms", gib(min(peaks)), ""])
    return markdown([title, "build, g", "product, g", "peak GiB", "difference"], rows)


def gib(size: float) -> str:
    return "–" if math.isnan(size) else f"{size / 2**30:.2f}"


def heading(device: torch.device, rounds: int) -> list[str]:
    lines = ["# One product on a GPU", "", *machine(("losslab", "torch"))]
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        lines += [f"- GPU: {name}, {gib(memory)} GiB, CUDA {torch.version.cuda}, float32 without TF32"]
    lines += [f"- {rounds} rounds: median (smallest–largest) of products in units of a gradient beside each"]
    lines += ["- build: with two products, in gradients; difference: from the streamed product, the worse of two"]
    return lines


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks, everything = list(cases(device, smoke=True)), list(WAYS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny networks; also without a GPU")
    parser.add_argument("--networks", nargs="+", choices=networks, default=networks)
    parser.add_argument("--ways", nargs="+", choices=everything, default=everything)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="file to write the tables to, as well")
    parser.add_argument("--run", choices=everything, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if device.type == "cpu" and not args.smoke:
        print("no CUDA device here, so nothing was measured (--smoke tries the script on the CPU)")
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if args.run:
        case = cases(device, smoke=args.smoke)[args.networks[0]]()
        print(json.dumps(measure(case, args.run, args.smoke, args.rounds)))
        return
    lines = heading(device, args.rounds)
    for network in args.networks:
        results = {}
        for way in args.ways:
            print(f"{network}, {way} …", file=sys.stderr)
            options = [f"--run={way}", f"--networks={network}", f"--rounds={args.rounds}", *["--smoke"] * args.smoke]
            results[way] = in_a_fresh_process(__file__, options, timeout=1800)
        lines += ["", *table(network, results)]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
