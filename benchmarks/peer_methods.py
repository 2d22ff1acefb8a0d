"""How each package is asked for the five outermost eigenvalues. A method: (problem, seed) -> eigenvalues."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from problem import Problem
from scipy.sparse.linalg import eigsh

from losslab import Hessian, eigenpairs, keep_freed_memory

K, TOL = 5, 1e-3
MOST_STEPS = 50  # with more, hessian-eigenthings stops reorthogonalising: eigenvalues come back several times


def worst_error(values: Sequence[float], reference: Sequence[float]) -> float:
    """The largest relative error, both sides sorted by magnitude."""
    got = np.array(sorted(values, key=abs, reverse=True))
    return float(np.abs(got / np.array(sorted(reference, key=abs, reverse=True)) - 1).max())


def by_losslab(problem: Problem, seed: int, *, tol: float = TOL, **options: Any) -> Sequence[float]:
    return eigenpairs(Hessian(problem.risk(**options)), K, which="largest_magnitude", tol=tol, seed=seed).values


def by_hessian_eigenthings(problem: Problem, seed: int, *, told: bool = True) -> Sequence[float]:
    from hessian_eigenthings import lanczos

    steps = problem.known["steps"][seed] if told else None
    return lanczos(eigenthings_operator(problem), k=K, max_iter=steps, seed=seed).eigenvalues.tolist()


def by_curvlinops(problem: Problem, seed: int, *, tol: float = TOL) -> Sequence[float]:
    operator = curvlinops_operator(problem).to_scipy()
    start = np.random.default_rng(seed).standard_normal(operator.shape[0])
    return eigsh(operator, k=K, which="LM", tol=tol, v0=start)[0]


def by_pyhessian(problem: Problem, seed: int) -> Sequence[float]:
    torch.manual_seed(seed)
    return pyhessian_computer(problem).eigenvalues(top_n=K)[0]


def eigenthings_operator(problem: Problem) -> Any:
    from hessian_eigenthings import HessianOperator, supervised_loss

    return HessianOperator(problem.model, problem.batches, supervised_loss(problem.loss_fn))


def curvlinops_operator(problem: Problem) -> Any:
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(problem.model, problem.loss_fn, list(problem.model.parameters()), problem.batches)


def pyhessian_computer(problem: Problem) -> Any:
    from pyhessian import hessian

    return hessian(problem.model, problem.loss_fn, dataloader=problem.batches, cuda=False)


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
        if worst_error(sorted(values, key=abs)[-K:], problem.known["reference"]) <= TOL:
            return steps
    return MOST_STEPS


@dataclass(frozen=True)
class Product:
    """A package's product: "module:Class.method", and how many vectors a call multiplies."""

    call: str
    vectors: Callable[[Any], int] = lambda _: 1


@dataclass(frozen=True)
class Method:
    """One row: its label, how it solves, what its products are, and what its process does first."""

    label: str
    solve: Callable[[Problem, int], Any]
    product: Product
    first: Callable[[], object] = lambda: None


OURS = Product("losslab.operators.hessian:Hessian._matmat", lambda matrix: matrix.shape[1])
EIGENTHINGS = Product("hessian_eigenthings:HessianOperator.matvec")
CURVLINOPS = Product("curvlinops:HessianLinearOperator._matmat", lambda tensors: tensors[0].shape[-1])
PYHESSIAN = Product("pyhessian:hessian.dataloader_hv_product")
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
