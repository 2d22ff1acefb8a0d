"""The spectrum in float64, which every answer of report.py is measured against, and what the packages are told.

All of it is computed once for a network and its data, and kept.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peer_methods import TOL, worst_error
from problem import Problem
from scipy.stats import wasserstein_distance
from torch import Tensor

from losslab import Hessian, eigenpairs, spectral_density

K = 5
TRACE_TOL = 0.01
MOST_STEPS = 150
LADDER = (24, 36, 48, 72, 96, 144, 192, 288, 384)  # products for a trace: even for XTrace, thirds for Hutch++
Quadrature = tuple[np.ndarray, np.ndarray]


def reference(problem: Problem, num_probes: int, num_nodes: int) -> dict[str, Any]:
    """Both ends to 1e-8, the exact trace, and the density from many probes, all in float64."""
    double = problem.double()
    hessian = Hessian(double.risk())
    pairs = eigenpairs(hessian, K, which="both_ends", tol=1e-8, max_basis=150, vectors=False)
    if not pairs.status.ok:
        raise RuntimeError(f"reference: eigenvalues not found to 1e-8: {pairs}")
    density = spectral_density(hessian, num_probes=num_probes, num_nodes=num_nodes)
    probes = list(zip(density.nodes.reshape(num_probes, -1), density.weights.reshape(num_probes, -1), strict=True))
    return {
        "top": pairs.values[:K].tolist(),
        "smallest": pairs.values[K:].tolist(),
        "trace": exact_trace(double),
        "nodes": density.nodes.tolist(),
        "weights": density.weights.tolist(),
        "num_probes": num_probes,
        "one_probe": np.mean([density_error(one, pooled(probes, i)) for i, one in enumerate(probes)]),
    }


def exact_trace(problem: Problem) -> float:
    """The trace of the Hessian of the mean cross-entropy of a piecewise linear network, without sampling.

    H = (1/N) Σᵢ (JᵢᵀΛᵢJᵢ + Σ_k ∂ℓᵢ/∂f_k ∇²f_k). Where ReLU, max pooling and convolution are all there is, f is linear
    in each single parameter almost everywhere, so the second part has a zero diagonal. With Λ = diag(p) − ppᵀ =
    Σ_k p_k (e_k − p)(e_k − p)ᵀ the trace is (1/N) Σᵢ Σ_k p_k ‖Jᵀ(e_k − p)‖²: one backward pass an example and class.
    """
    parameters, total, examples = list(problem.model.parameters()), 0.0, 0
    for inputs, _ in problem.batches:
        for one in inputs.split(1):
            (logits,) = problem.model(one)
            chances = logits.detach().softmax(dim=0)
            for chance, unit in zip(chances, torch.eye(len(chances)).to(chances), strict=True):
                rows = torch.autograd.grad(logits, parameters, grad_outputs=unit - chances, retain_graph=True)
                total += float(chance * sum(row.pow(2).sum() for row in rows))
            examples += 1
    return total / examples


def density_error(got: Quadrature, true: Quadrature) -> float:
    """Wasserstein-1 distance of two distributions of eigenvalues, in units of the true mean |λ|.

    That unit is the distance from "all eigenvalues are zero", which therefore has error 1.
    """
    (nodes, weights), (true_nodes, true_weights) = got, true
    mean = np.average(np.abs(true_nodes), weights=true_weights)
    # Float32 weights of a ghost may come out a rounding error below zero.
    return float(wasserstein_distance(nodes, true_nodes, np.clip(weights, 0, None), true_weights) / mean)


def pooled(probes: Sequence[Quadrature], without: int) -> Quadrature:
    """All probes but one."""
    others = [probe for i, probe in enumerate(probes) if i != without]
    return np.concatenate([nodes for nodes, _ in others]), np.concatenate([weights for _, weights in others])


# -- what hessian-eigenthings and curvlinops are told, so that they reach the same accuracy -----------------


def told(problem: Problem, methods: Sequence[str], seeds: int) -> dict[str, Any]:
    """Lanczos steps for each seed, and products for a trace: found with losslab's products, since those are cheaper."""
    hessian, known = Hessian(problem.risk()), problem.known
    found: dict[str, Any] = {"steps": known.get("steps", [])}
    if "hessian-eigenthings" in methods and importlib.util.find_spec("hessian_eigenthings"):
        found["steps"] += [steps_needed(hessian, known, seed) for seed in range(len(found["steps"]), seeds)]
        found["hutch++"] = known.get("hutch++") or hutchpp_needed(hessian, known["trace"])
    if "curvlinops" in methods and importlib.util.find_spec("curvlinops"):
        found["xtrace"] = known.get("xtrace") or xtrace_needed(hessian, known["trace"])
    return found


def steps_needed(hessian: Hessian, known: dict[str, Any], seed: int) -> tuple[int, int]:
    """The fewest steps that make hessian-eigenthings' top, and its smallest, eigenvalues right to TOL."""
    from hessian_eigenthings import lanczos_tridiagonal

    operator = eigenthings_operator(hessian)
    start = torch.randn(hessian.size, generator=torch.Generator().manual_seed(seed))  # as its `lanczos` does
    run = lanczos_tridiagonal(operator, start, min(MOST_STEPS, hessian.size))
    projected = torch.diag(run.alphas) + torch.diag(run.betas, 1) + torch.diag(run.betas, -1)
    top = smallest = len(projected)
    for steps in range(len(projected), K, -1):
        values = np.linalg.eigvalsh(projected[:steps, :steps].double().numpy())
        top = steps if worst_error(values[-K:], known["top"]) <= TOL else top
        smallest = steps if worst_error(values[:K], known["smallest"]) <= TOL else smallest
    return top, smallest


def hutchpp_needed(hessian: Hessian, true: float) -> int:
    """Products until hessian-eigenthings' own standard error is within the tolerance."""
    from hessian_eigenthings import trace

    operator = eigenthings_operator(hessian)
    return first_rung(lambda number: trace(operator, num_matvecs=number, seed=0).stderr, true)


def xtrace_needed(hessian: Hessian, true: float) -> int:
    """Products until XTrace's leave-one-out spread is within the tolerance; curvlinops computes it, and drops it."""
    module = importlib.import_module("curvlinops.trace.epperly2024xtrace")
    seen: list[Tensor] = []
    original = module.mean
    module.mean = lambda values: seen.append(values) or original(values)
    torch.manual_seed(0)

    def error(number: int) -> float:
        module.xtrace(hessian, number)
        return float(seen[-1].std() / len(seen[-1]) ** 0.5)

    try:
        return first_rung(error, true)
    finally:
        module.mean = original


def first_rung(error: Any, true: float) -> int:
    """The first number of products whose error is within TRACE_TOL, or the last number."""
    return next((number for number in LADDER if error(number) <= TRACE_TOL * abs(true)), LADDER[-1])


def eigenthings_operator(hessian: Hessian) -> Any:
    from hessian_eigenthings import LambdaOperator

    return LambdaOperator(lambda vector: hessian @ vector, hessian.size)
