"""How each package is asked for the five outermost eigenvalues. A method: (problem, seed) -> eigenvalues."""

import copy
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from data import Batches
from scipy.sparse.linalg import eigsh
from torch import nn

from losslab import EmpiricalRisk, Hessian, eigenpairs, keep_freed_memory

K, TOL = 5, 1e-3
MOST_STEPS = 50  # with more, hessian-eigenthings stops reorthogonalising: eigenvalues come back several times


@dataclass(frozen=True)
class Problem:
    """What each method gets; `known`: float64 eigenvalues, and hessian-eigenthings' steps for each seed."""

    model: nn.Module
    loss_fn: nn.Module
    batches: Batches
    known: dict[str, Any]

    def double(self) -> "Problem":
        batches = [(x.double(), y) for x, y in self.batches]
        return replace(self, model=copy.deepcopy(self.model).double(), batches=batches)

    def error(self, values: Sequence[float]) -> float:
        """The largest relative error, both sides sorted by magnitude."""
        got = np.array(sorted(values, key=abs, reverse=True))
        return float(np.abs(got / np.array(self.known["reference"]) - 1).max())


def by_losslab(problem: Problem, seed: int, *, tol: float = TOL, **options: Any) -> Sequence[float]:
    risk = EmpiricalRisk(problem.model, problem.loss_fn, problem.batches, **options)
    return eigenpairs(Hessian(risk), K, which="largest_magnitude", tol=tol, seed=seed).values


def by_hessian_eigenthings(problem: Problem, seed: int, *, told: bool = True) -> Sequence[float]:
    from hessian_eigenthings import lanczos

    steps = problem.known["steps"][seed] if told else None
    return lanczos(eigenthings_operator(problem), k=K, max_iter=steps, seed=seed).eigenvalues.tolist()


def by_curvlinops(problem: Problem, seed: int, *, tol: float = TOL) -> Sequence[float]:
    from curvlinops import HessianLinearOperator

    parameters = list(problem.model.parameters())
    operator = HessianLinearOperator(problem.model, problem.loss_fn, parameters, problem.batches).to_scipy()
    start = np.random.default_rng(seed).standard_normal(operator.shape[0])
    return eigsh(operator, k=K, which="LM", tol=tol, v0=start)[0]


def by_pyhessian(problem: Problem, seed: int) -> Sequence[float]:
    from pyhessian import hessian

    torch.manual_seed(seed)
    computer = hessian(problem.model, problem.loss_fn, dataloader=problem.batches, cuda=False)
    return computer.eigenvalues(top_n=K)[0]


def eigenthings_operator(problem: Problem) -> Any:
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(problem.model, problem.batches, supervised_loss(problem.loss_fn))


def steps_needed(problem: Problem, seed: int) -> int:
    """The fewest Lanczos steps that make hessian-eigenthings right to TOL from this seed's start vector."""
    from hessian_eigenthings import lanczos_tridiagonal

    operator = eigenthings_operator(problem)
    generator = torch.Generator().manual_seed(seed)  # as its `lanczos` does
    start = torch.randn(operator.size, generator=generator)
    run = lanczos_tridiagonal(operator, start, MOST_STEPS)
    projected = torch.diag(run.alphas) + torch.diag(run.betas, 1) + torch.diag(run.betas, -1)
    for steps in range(K, MOST_STEPS):
        values = np.linalg.eigvalsh(projected[:steps, :steps].double().numpy())
        if problem.error(sorted(values, key=abs)[-K:]) <= TOL:
            return steps
    return MOST_STEPS


@dataclass(frozen=True)
class Method:
    """One row: its label, how it solves, whose calls are its products, and what its process does first."""

    label: str
    solve: Callable[[Problem, int], Sequence[float]]
    product: str
    first: Callable[[], object] = lambda: None


OURS = "losslab.operators.hessian:Hessian._matmat"
EIGENTHINGS = "hessian_eigenthings:HessianOperator.matvec"
CURVLINOPS = "curvlinops:HessianLinearOperator._matmat"
PYHESSIAN = "pyhessian:hessian.dataloader_hv_product"
streamed = functools.partial(by_losslab, graph_memory=0)
unchecked = functools.partial(by_losslab, check=False)
untold = functools.partial(by_hessian_eigenthings, told=False)
METHODS = {
    "losslab": Method("losslab", by_losslab, OURS),
    "losslab-streamed": Method("losslab, streamed", streamed, OURS),
    "losslab-keep-freed": Method("losslab, freed memory kept", by_losslab, OURS, keep_freed_memory),
    "losslab-unchecked": Method("losslab, check=False", unchecked, OURS),
    "losslab-unchecked-keep-freed": Method("losslab, both", unchecked, OURS, keep_freed_memory),
    "hessian-eigenthings": Method("hessian-eigenthings, told its steps", by_hessian_eigenthings, EIGENTHINGS),
    "hessian-eigenthings-defaults": Method("hessian-eigenthings, defaults", untold, EIGENTHINGS),
    "curvlinops": Method("curvlinops, SciPy's eigsh", by_curvlinops, CURVLINOPS),
    "pyhessian": Method("PyHessian", by_pyhessian, PYHESSIAN),
}


def counted(product: str) -> list[int]:
    """Count the calls of "module:Class.method" from now on. Imports the module, so that no timing does."""
    module, _, path = product.partition(":")
    owner, _, name = path.partition(".")
    cls, count = getattr(importlib.import_module(module), owner), [0]
    original = getattr(cls, name)

    def counting(*args: Any) -> Any:
        count[0] += 1
        return original(*args)

    setattr(cls, name, counting)
    return count
