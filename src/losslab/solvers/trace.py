"""The trace by Krylov-deflated Hutchinson sampling."""

import dataclasses
import math

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.random import make_generator, rademacher
from losslab.solvers.budget import Budget
from losslab.solvers.density import extend
from losslab.solvers.estimate import Estimate
from losslab.solvers.krylov import Krylov
from losslab.status import Progress, Status

_BLOCK = 8  # vectors that share a pass over the data where graphs are not kept
_MIN_SAMPLES = 8  # fewer give no usable standard error


def trace(
    operator: LinearOperator,
    *,
    tol: float = 0.01,
    max_matvecs: int = 96,
    time_budget: float | None = None,
    seed: int | torch.Generator = 0,
    vectors: Tensor | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """What is the sum of the eigenvalues?  tr A = tr(QAQᵀ) + E[z⊥ᵀAz⊥],  z⊥ = (I − QᵀQ)z.

    The first half of the budget builds a Krylov basis Q, on whose span the trace is known exactly (it holds the large
    eigenvalues, which make Hutchinson's estimator noisy); Rademacher vectors z sample the rest.

    Args:
        operator: Symmetric n×n.
        tol: Stop once the standard error is below tol·|trace|.
        max_matvecs: Products at most.
        time_budget: Seconds at most.
        seed: Of the vectors; or a generator.
        vectors: (s, n) samples of one's own; then nothing is deflated and all are used: plain Hutchinson.
        progress: Called after each block of products.

    Returns:
        Estimate with its standard error; `budget_reached` if that is above tol·|trace|.

    Raises:
        ValueError: tol not above 0, max_matvecs below 16, vectors of another shape.
    """
    if not tol > 0:
        raise ValueError(f"tol: expected a number > 0, got {tol!r}")
    if vectors is not None:
        if vectors.ndim != 2 or vectors.shape[1] != operator.size or not len(vectors):
            raise ValueError(f"vectors: expected shape (s, {operator.size}), got {tuple(vectors.shape)}")
        samples = deflated_samples(operator, vectors, None)
        return estimate(0.0, samples, len(vectors), tol, None)
    if max_matvecs < 2 * _MIN_SAMPLES:
        raise ValueError(f"max_matvecs: expected at least {2 * _MIN_SAMPLES}, got {max_matvecs}")
    generator = make_generator(seed)
    budget = Budget(max_matvecs, time_budget, progress, ranks=operator.split.ranks)
    krylov = Krylov(operator, rademacher((operator.size,), generator), max_matvecs // 2)
    status = extend(krylov, krylov.capacity, budget, "trace")
    # An invariant subspace is not the end: the rest of the basis makes small and degenerate matrices exact.
    while krylov.broken and krylov.new_block(generator):
        status = extend(krylov, krylov.capacity, budget, "trace")
    if not status.ok:
        return Estimate(math.nan, math.inf, 0, krylov.matvecs, status)
    return complete(krylov, tol, generator, budget, seed if isinstance(seed, int) else None)


def complete(
    krylov: Krylov, tol: float, generator: torch.Generator, budget: Budget, seed: int | None = None
) -> Estimate:
    """The trace from a Krylov space that is there already: its own trace plus samples of the complement."""
    operator, known = krylov.operator, float(krylov.projected.diagonal()[: krylov.size].sum())
    if krylov.size == operator.size:
        return Estimate(known, 0.0, 0, krylov.matvecs, Status.breakdown, seed)
    samples = torch.empty(0, dtype=torch.float64)
    while (over := budget.stop()) is None:
        block = rademacher((min(_BLOCK, budget.left), operator.size), generator)
        samples = torch.cat([samples, deflated_samples(operator, block, krylov)])
        result = estimate(known, samples, krylov.matvecs + len(samples), tol, seed)
        budget.spend(len(block), f"trace {result.value:.4g} ± {result.standard_error:.1g}")
        if len(samples) >= _MIN_SAMPLES and result.status is not Status.budget_reached:
            return result
    if not len(samples):
        return Estimate(math.nan, math.inf, 0, krylov.matvecs, over, seed)
    return dataclasses.replace(result, status=over)


def deflated_samples(operator: LinearOperator, vectors: Tensor, krylov: Krylov | None) -> Tensor:
    """z⊥ᵀAz⊥ for each row z: float64 of shape (s,). Cost: s products."""
    rows = vectors.to(device=operator.device, dtype=torch.promote_types(operator.dtype, torch.float32))
    rows = operator.split.part(rows)
    if krylov is not None:
        rows = krylov.deflate(rows)
    products = operator.matmat_part(rows.mT).mT
    return operator.split.sum((rows.double() * products.double()).sum(dim=1)).cpu()


def estimate(known: float, samples: Tensor, matvecs: int, tol: float, seed: int | None) -> Estimate:
    """Mean and standard error of the samples on top of what is known exactly."""
    value = known + float(samples.mean())
    error = float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.inf
    if not math.isfinite(value):
        status = Status.nonfinite
    else:
        status = Status.converged if error <= tol * abs(value) else Status.budget_reached
    return Estimate(value, error, len(samples), matvecs, status, seed)
