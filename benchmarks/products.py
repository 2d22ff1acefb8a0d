"""What one product with the Hessian, or the Gauss-Newton matrix, costs by each way of computing it, in gradients.

    python benchmarks/products.py --data FOLDER --output benchmarks/results/products.md

Why losslab keeps autograd's graph with a double backward of its own, rather than `torch.func.linearize`: compare the
columns "build" and "product". All ways run in turn in one process, on one batch.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from data import images, trained_cnn
from table import machine, markdown, spread
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, linearize, vjp
from torch.nn.functional import cross_entropy

from losslab import EmpiricalRisk
from losslab.operators.gauss_newton import OutputGraph, loss_hessian
from losslab.operators.gradient_graph import GradientGraph
from losslab.operators.kept_graphs import Graph

Product = Callable[[], list[Tensor]]
Ways = dict[str, Callable[[], Product]]  # name -> a function that builds what can be kept and returns the product


def hessian_ways(model: nn.Module, x: Tensor, y: Tensor, vector: dict[str, Tensor]) -> Ways:
    directions = list(vector.values())
    point = {name: p.detach().clone() for name, p in model.named_parameters()}
    leaves = {name: p.clone().requires_grad_() for name, p in point.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return cross_entropy(functional_call(model, parameters, (x,)), y)

    def graph() -> list[Tensor]:
        return list(torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True))

    def through(gradients: list[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(gradients, list(leaves.values()), grad_outputs=directions, retain_graph=True)
        return list(found)

    def kept() -> Product:
        gradients = graph()
        return lambda: through(gradients)

    def ours() -> Product:
        risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(x, y)], check=False)
        return product_of(GradientGraph(risk, leaves, (x, y), len(y)), risk, directions)

    def linearized() -> Product:
        _, product = linearize(grad(loss), point)
        return lambda: list(product(vector).values())

    def forward_over_reverse() -> Product:
        return lambda: list(jvp(grad(loss), (point,), (vector,))[1].values())

    return {
        "graph kept, double backward of losslab": ours,
        "graph kept, autograd's double backward": kept,
        "torch.func.linearize of the gradient": linearized,
        "graph rebuilt for each product": lambda: lambda: through(graph()),
        "torch.func.jvp of the gradient": forward_over_reverse,
    }


def gauss_newton_ways(model: nn.Module, x: Tensor, y: Tensor, vector: dict[str, Tensor]) -> Ways:
    point = {name: p.detach().clone() for name, p in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (x,))

    def curved(f: Tensor, along: Tensor) -> Tensor:
        return jvp(grad(lambda logits: cross_entropy(logits, y)), (f,), (along,))[1]

    def ours() -> Product:
        risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(x, y)], check=False)
        leaves = risk.leaves(risk.space.vector())
        graph = OutputGraph(risk, leaves, (x, y), len(y), curvature=loss_hessian)
        return product_of(graph, risk, list(vector.values()))

    def linearized() -> Product:
        f, along = linearize(outputs, point)
        back = vjp(outputs, point)[1]
        return lambda: list(back(curved(f, along(vector)))[0].values())

    def rebuilt() -> Product:
        def product() -> list[Tensor]:
            f, along = jvp(outputs, (point,), (vector,))
            return list(vjp(outputs, point)[1](curved(f, along))[0].values())

        return product

    return {
        "graphs kept, Jv through the graph of Jᵀu, of losslab": ours,
        "torch.func.linearize and vjp of the outputs, both kept": linearized,
        "torch.func.jvp and vjp of the outputs": rebuilt,
    }


def product_of(graph: Graph, risk: EmpiricalRisk, directions: list[Tensor]) -> Product:
    flat = risk.space.flatten(directions).unsqueeze(0)

    def product() -> list[Tensor]:
        out = torch.zeros_like(flat)
        graph.add_products(flat, out)
        return risk.space.views(out[0])

    return product


def measure(model: nn.Module, x: Tensor, y: Tensor, rounds: int, ways: Callable[..., Ways]) -> list[list[str]]:
    """A row for each way: build and product in units of g, and the largest difference from the first way."""
    generator = torch.Generator().manual_seed(0)
    vector = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    parameters = list(model.parameters())

    def gradient() -> object:
        return torch.autograd.grad(cross_entropy(model(x), y), parameters)

    units = [seconds(gradient) for _ in range(rounds + 1)][1:]
    builds, products, values = {}, {}, {}
    for name, build in ways(model, x, y, vector).items():
        began = time.perf_counter()
        products[name] = build()
        builds[name] = time.perf_counter() - began
        values[name] = products[name]()
    costs: dict[str, list[float]] = {name: [] for name in products}
    for _ in range(rounds):
        g = seconds(gradient)
        units.append(g)
        for name, product in products.items():
            costs[name].append(seconds(product) / g)
    unit, first = statistics.median(units), next(iter(values.values()))
    rows = [["one gradient", f"{unit:.3f} s", "1", "–"]]
    for name in products:
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(values[name], first, strict=True))
        rows.append([name, f"{builds[name] / unit:.1f}", spread(costs[name], ".2f"), f"{error:.0e}"])
    return rows


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz; without it synthetic images")
    parser.add_argument("--examples", type=int, default=125)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="file to write the tables to, as well")
    args = parser.parse_args()
    x, y = images(args.data, args.examples)
    cnn, _ = trained_cnn(args.data)
    torch.manual_seed(0)
    hidden = [nn.Linear(3072, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    mlp = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))
    lines = ["# One product with the Hessian or the Gauss-Newton matrix", "", *machine(("losslab", "torch"))]
    lines += [f"- {args.examples} images in one batch, {args.rounds} rounds in turn: median (smallest–largest)"]
    lines += ["- build: once for a batch; difference: relative to the first row, worst tensor, float32"]
    for name, model in {"SimpleCNN, 183,754 parameters": cnn, "MLP 3072-256-256-10": mlp}.items():
        for matrix, ways in {"Hessian": hessian_ways, "Gauss-Newton": gauss_newton_ways}.items():
            header = [f"{matrix}, {name}", "build, g", "product, g", "difference"]
            lines += ["", *markdown(header, measure(model, x, y, args.rounds, ways))]
    print("\n".join(lines))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
