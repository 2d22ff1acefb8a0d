"""The trace by Krylov-deflated Hutchinson sampling."""

import math

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.random import make_generator, rademacher
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
    krylov = Krylov(operator, rademacher((operator.size,), generator), max_matvecs // 2)
    status = extend(krylov, krylov.capacity, progress, 0, max_matvecs)
    # An invariant subspace is not the end: the rest of the basis makes small and degenerate matrices exact.
    while krylov.broken and krylov.new_block(generator):
        status = extend(krylov, krylov.capacity, progress, 0, max_matvecs)
    if status is Status.nonfinite:
        return Estimate(math.nan, math.nan, 0, krylov.matvecs, status)
    known_seed = seed if isinstance(seed, int) else None
    return complete(krylov, max_matvecs - krylov.matvecs, tol, generator, known_seed, progress)


def complete(
    krylov: Krylov,
    max_samples: int,
    tol: float,
    generator: torch.Generator,
    seed: int | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """The trace from a Krylov space that is there already: its own trace plus samples of the complement."""
    operator, known = krylov.operator, float(krylov.projected.diagonal()[: krylov.size].sum())
    if krylov.size == operator.size:
        return Estimate(known, 0.0, 0, krylov.matvecs, Status.breakdown, seed)
    basis = krylov.basis[: krylov.size]
    samples = torch.empty(0, dtype=torch.float64)
    while len(samples) < max_samples:
        size = min(_BLOCK, max_samples - len(samples))
        block = rademacher((size, operator.size), generator)
        samples = torch.cat([samples, deflated_samples(operator, block, basis)])
        if progress is not None:
            progress(krylov.matvecs + len(samples), krylov.matvecs + max_samples, "trace")
        result = estimate(known, samples, krylov.matvecs + len(samples), tol, seed)
        if len(samples) >= _MIN_SAMPLES and result.status is not Status.budget_reached:
            break
    return result


def deflated_samples(operator: LinearOperator, vectors: Tensor, basis: Tensor | None) -> Tensor:
    """z⊥ᵀAz⊥ for each row z: float64 of shape (s,). Cost: s products."""
    rows = vectors.to(device=operator.device, dtype=torch.promote_types(operator.dtype, torch.float32))
    if basis is not None:
        for _ in range(2):
            rows = rows - (rows @ basis.mT) @ basis
    products = operator.matmat(rows.mT).mT
    return (rows.double() * products.double()).sum(dim=1).cpu()


def estimate(known: float, samples: Tensor, matvecs: int, tol: float, seed: int | None) -> Estimate:
    """Mean and standard error of the samples on top of what is known exactly."""
    value = known + float(samples.mean())
    error = float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.inf
    if not math.isfinite(value):
        status = Status.nonfinite
    else:
        status = Status.converged if error <= tol * abs(value) else Status.budget_reached
    return Estimate(value, error, len(samples), matvecs, status, seed)
