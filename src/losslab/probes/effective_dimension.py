"""How many directions does the data determine?  The trace of H(H + zI)⁻¹."""

import math

import numpy as np
import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.random import make_generator, rademacher
from losslab.solvers.budget import Budget
from losslab.solvers.density import extend, quadrature
from losslab.solvers.estimate import Estimate
from losslab.solvers.krylov import Krylov
from losslab.status import Status, worst

_LOCATED = 1e-3  # relative residual from which on a Ritz pair counts as one eigenpair


def effective_dimension(
    operator: LinearOperator, ridge: float, num_nodes: int, num_probes: int, budget: Budget, seed: int
) -> tuple[Estimate, Estimate, Status]:
    """Σ λᵢ/(λᵢ + z) over the positive eigenvalues (MacKay 1992), and Σ λᵢ, as sampled estimates.

    MacKay's γ: a direction whose curvature is far above z is determined by the data and counts one, one far below
    counts nothing. Eigenvalues that a Lanczos run of `num_nodes` steps locates count exactly; of the rest the trace is
    sampled by stochastic Lanczos quadrature, with signs from which the located eigenvectors are removed.

    Args:
        operator: H.
        ridge: z.
        num_nodes: Lanczos steps m a run.
        num_probes: Runs for the rest.
        budget: What it may spend: (num_probes + 1)·m products in all.
        seed: Of the signs.

    Returns:
        The dimension, the trace, and why it ended. Both are NaN where it ended before the first run for the rest.
    """
    generator = make_generator(seed)
    first = Krylov(operator, rademacher((operator.size,), generator), num_nodes)
    status = extend(first, num_nodes, budget, lambda: "eigenvalues")
    values, residuals, columns = first.ritz()
    floor = first.rounding * first.norm
    located = (residuals <= _LOCATED * np.abs(values)) & (np.abs(values) > floor) | (first.size == operator.size)
    known = np.array([_shares(values[located], ridge).sum(), values[located].sum()])
    if first.size == operator.size or not status.ok:
        estimates = [_judged(k, np.zeros(0), first.size == operator.size, budget.used, seed) for k in known]
        return estimates[0], estimates[1], status
    vectors = first.ritz_vectors(columns[:, located])
    samples, statuses = [], [status]
    for signs in rademacher((num_probes, operator.size), generator):
        rest = _without(signs.to(vectors), vectors)
        length = float(rest.double().norm())
        if length <= math.sqrt(first.rounding * operator.size):  # nothing is left
            samples.append((0.0, 0.0))
            continue
        krylov = Krylov(operator, rest, num_nodes)
        statuses.append(extend(krylov, num_nodes, budget, lambda: "the rest of the spectrum"))
        if not statuses[-1].ok:
            break
        nodes, weights = quadrature(krylov)
        samples.append((length**2 * float(weights @ _shares(nodes, ridge)), length**2 * float(weights @ nodes)))
    found = np.array(samples).reshape(-1, 2)
    estimates = [_judged(k, rest, False, budget.used, seed) for k, rest in zip(known, found.T, strict=True)]
    return estimates[0], estimates[1], worst(*statuses)


def _shares(values: np.ndarray, ridge: float) -> np.ndarray:
    """λ/(λ + z); directions that curve downwards are determined by nothing and count 0."""
    positive = np.maximum(values, 0.0)
    return positive / (positive + ridge)


def _without(vector: Tensor, vectors: Tensor) -> Tensor:
    for _ in range(2):  # twice, so that rounding leaves nothing behind
        vector = vector - vectors @ (vectors.mT @ vector)
    return vector


def _judged(known: float, rest: np.ndarray, whole: bool, matvecs: int, seed: int) -> Estimate:
    if whole:
        return Estimate.exact(float(known), matvecs, seed)
    if not len(rest):
        return Estimate.unknown(Status.budget_reached, matvecs, seed)
    return Estimate.mean(torch.from_numpy(rest.copy()), matvecs, 0.05, seed, known=float(known))
