"""How each package is asked for the whole report: both ends of the spectrum, its density, and the trace.

A call: (operator, what it is told, seed, answers so far) -> {"top" | "smallest" | "density" | "trace": …}.
losslab also says how well it knows them, in "status", and its products, in "matvecs": those of the trace's last samples
are made batch by batch, where no counted call sees them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peer_methods import (
    CURVLINOPS,
    EIGENTHINGS,
    OURS,
    PYHESSIAN,
    TOL,
    Product,
    curvlinops_operator,
    eigenthings_operator,
    pyhessian_computer,
)
from problem import Problem
from reference import K
from scipy.sparse.linalg import eigsh

from losslab import EmpiricalRisk, SpectrumOptions, spectrum

NODES = 100
ANSWERS = ("top", "smallest", "density", "trace")
Known = dict[str, Any]
Answers = dict[str, Any]
Call = Callable[[Any, Known, int, Answers], Answers]


@dataclass(frozen=True)
class Method:
    """One row: its label, what makes its operator, the calls in turn, what its products are."""

    label: str
    make: Callable[[Problem], Any]
    calls: dict[str, Call]
    product: Product


def losslab_spectrum(
    risk: EmpiricalRisk, _: Known, seed: int, __: Answers, *, options: SpectrumOptions | None = None
) -> Answers:
    found = spectrum(risk, k=K, options=options, seed=seed)
    answers = {"top": found.top, "smallest": found.smallest, "trace": found.trace.value, "matvecs": found.matvecs}
    return answers | {"density": (found.density.nodes, found.density.weights), "status": found.status}


def eigenthings_end(operator: Any, known: Known, seed: int, _: Answers, *, end: str, told: bool = True) -> Answers:
    from hessian_eigenthings import lanczos

    which, number = ("LA", 0) if end == "top" else ("SA", 1)
    steps = {"max_iter": known["steps"][seed][number], "reorthogonalize": True} if told else {}
    return {end: lanczos(operator, k=K, which=which, seed=seed, **steps).eigenvalues.tolist()}


def eigenthings_density(operator: Any, _: Known, seed: int, __: Answers, *, told: bool = True) -> Answers:
    from hessian_eigenthings import spectral_density

    size = {"num_runs": 1, "lanczos_steps": min(NODES, operator.size)} if told else {}
    found = spectral_density(operator, seed=seed, **size)
    return {"density": (found.raw_eigenvalues.flatten().numpy(), found.raw_weights.flatten().numpy())}


def eigenthings_trace(operator: Any, known: Known, seed: int, _: Answers, *, told: bool = True) -> Answers:
    from hessian_eigenthings import trace

    return {"trace": trace(operator, seed=seed, **({"num_matvecs": known["hutch++"]} if told else {})).estimate}


def curvlinops_ends(operator: Any, _: Known, seed: int, __: Answers) -> Answers:
    """One ARPACK run for both ends is cheaper than two."""
    start = np.random.default_rng(seed).standard_normal(operator.shape[0])
    values = eigsh(operator.to_scipy(), k=2 * K, which="BE", tol=TOL, v0=start, return_eigenvectors=False)
    return {"top": values[K:], "smallest": values[:K]}


def curvlinops_density(operator: Any, _: Known, seed: int, answers: Answers) -> Answers:
    """Told the ends that it would else compute once more; the cached variant also gives the nodes."""
    from curvlinops import LanczosApproximateSpectrumCached

    torch.manual_seed(seed)
    ends = (float(min(answers["smallest"])), float(max(answers["top"])))
    cached = LanczosApproximateSpectrumCached(operator, NODES, boundaries=ends)
    cached.approximate_spectrum()
    nodes, vectors = cached._lanczos_iters[0]
    return {"density": (nodes.numpy(), vectors[0].square().numpy())}


def curvlinops_trace(operator: Any, known: Known, seed: int, _: Answers) -> Answers:
    from curvlinops import xtrace

    torch.manual_seed(seed)
    return {"trace": float(xtrace(operator, known["xtrace"]))}


def pyhessian_top(computer: Any, _: Known, seed: int, __: Answers) -> Answers:
    torch.manual_seed(seed)
    return {"top": computer.eigenvalues(top_n=K)[0]}


def pyhessian_density(computer: Any, _: Known, seed: int, __: Answers) -> Answers:
    nodes, weights = computer.density(iter=NODES)
    return {"density": (np.real(nodes[0]), np.real(weights[0]))}


def pyhessian_trace(computer: Any, _: Known, seed: int, __: Answers) -> Answers:
    return {"trace": float(np.mean(computer.trace()))}


def eigenthings_calls(told: bool) -> dict[str, Call]:
    return {
        "top": functools.partial(eigenthings_end, end="top", told=told),
        "smallest": functools.partial(eigenthings_end, end="smallest", told=told),
        "density": functools.partial(eigenthings_density, told=told),
        "trace": functools.partial(eigenthings_trace, told=told),
    }


OUR_CALLS: dict[str, Call] = {"all at once": losslab_spectrum}
PATIENT = SpectrumOptions(trace_samples=1000)  # so many that the tolerance ends it, not the budget
PATIENT_CALLS: dict[str, Call] = {"all at once": functools.partial(losslab_spectrum, options=PATIENT)}
CURVLINOPS_CALLS = {"ends": curvlinops_ends, "density": curvlinops_density, "trace": curvlinops_trace}
PYHESSIAN_CALLS = {"top": pyhessian_top, "density": pyhessian_density, "trace": pyhessian_trace}
METHODS = {
    "losslab": Method("losslab", Problem.risk, OUR_CALLS, OURS),
    "losslab-patient": Method("losslab, until the trace is known to 1 %", Problem.risk, PATIENT_CALLS, OURS),
    "losslab-streamed": Method("losslab, streamed", functools.partial(Problem.risk, graph_memory=0), OUR_CALLS, OURS),
    "hessian-eigenthings": Method(
        "hessian-eigenthings, told its numbers", eigenthings_operator, eigenthings_calls(True), EIGENTHINGS
    ),
    "hessian-eigenthings-defaults": Method(
        "hessian-eigenthings, defaults", eigenthings_operator, eigenthings_calls(False), EIGENTHINGS
    ),
    "curvlinops": Method("curvlinops, SciPy's eigsh", curvlinops_operator, CURVLINOPS_CALLS, CURVLINOPS),
    "pyhessian": Method("PyHessian", pyhessian_computer, PYHESSIAN_CALLS, PYHESSIAN),
}
