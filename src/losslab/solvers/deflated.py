"""Trace and Frobenius norm by Hutchinson sampling outside a Krylov space."""

import dataclasses
import itertools
import math

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.random import make_generator, rademacher
from losslab.solvers.budget import Budget
from losslab.solvers.density import extend
from losslab.solvers.estimate import Estimate
from losslab.solvers.estimator import Estimator
from losslab.solvers.krylov import Krylov
from losslab.status import Status


class Deflated(Estimator[Estimate]):
    """tr A = tr(QAQᵀ) + E[z⊥ᵀAz⊥] for random signs z, z⊥ = (I − QᵀQ)z, Q the basis of a Krylov space.

    On the span of Q the trace is known exactly; it holds the large eigenvalues, which make Hutchinson's estimator
    noisy. After the first block each term of a sum A (each batch of a risk) gets vectors of its own (`forms`): less
    scatter at the same cost. Memory: Q and a block of vectors.
    """

    def __init__(self, krylov: Krylov, tol: float, budget: Budget, generator: torch.Generator, seed: int | None = None):
        super().__init__(krylov.operator, tol, budget, generator, seed)
        self.krylov = krylov
        self.known = float(krylov.projected.diagonal()[: krylov.size].sum())
        self.samples, self.squares = torch.empty(2, 0, dtype=torch.float64)  # of the trace, and of ‖A‖_F²

    def add(self, vectors: Tensor) -> Estimate:
        """One sample a vector."""
        rows = self.krylov.deflate(vectors)
        if not len(self.samples):
            products = self.multiply(rows)
            samples, self.squares = self.dots(rows, products), self.dots(products, products)
        else:
            more = (self.krylov.deflate(self.part(self.draw(len(vectors)))) for _ in iter(int, 1))
            samples = self.operator.forms(itertools.chain([rows], more))
            self.budget.spend(len(rows), self.note)
        self.samples = torch.cat([self.samples, samples])
        return Estimate.mean(self.samples, self.matvecs, self.tol, self.seed, self.known)

    @property
    def matvecs(self) -> int:
        """Products, those of the Krylov space included."""
        return self.krylov.matvecs + len(self.samples)

    def frobenius_norm(self) -> Estimate:
        """‖A‖_F from the same products: ‖AQᵀ‖_F² is known, and E‖Az⊥‖² is the rest; the error to first order."""
        known = float((self.krylov.projected[: self.krylov.size, : self.krylov.size] ** 2).sum())
        known += float((self.krylov.coupling**2).sum())
        if self.krylov.size == self.operator.size:
            return Estimate.exact(math.sqrt(known), self.matvecs, self.seed)
        if not len(self.squares):
            return Estimate.unknown(Status.budget_reached, self.matvecs, self.seed)
        square = Estimate.mean(self.squares, self.matvecs, math.inf, self.seed, known)
        if not square.value > 0:
            return square
        value = math.sqrt(square.value)
        return dataclasses.replace(square, value=value, standard_error=square.standard_error / (2 * value))


def krylov_trace(operator: LinearOperator, tol: float, budget: Budget, seed: int | torch.Generator) -> Estimate:
    """The trace from a Krylov space that half of the budget builds, and samples outside it for the other half."""
    generator = make_generator(seed)
    krylov = Krylov(operator, rademacher((operator.size,), generator), budget.max_matvecs // 2)
    status = extend(krylov, krylov.capacity, budget, lambda: "trace")
    # An invariant subspace is not the end: the rest of the basis makes small and degenerate matrices exact.
    while krylov.broken and krylov.new_block(generator):
        status = extend(krylov, krylov.capacity, budget, lambda: "trace")
    known_seed = seed if isinstance(seed, int) else None
    if not status.ok:
        return Estimate.unknown(status, krylov.matvecs, known_seed)
    return complete(krylov, tol, generator, budget, known_seed)[0]


def complete(
    krylov: Krylov, tol: float, generator: torch.Generator, budget: Budget, seed: int | None = None
) -> tuple[Estimate, Estimate]:
    """Trace and Frobenius norm from a Krylov space that is there already, and samples of its complement."""
    estimator = Deflated(krylov, tol, budget, generator, seed)
    if krylov.size == krylov.operator.size:
        trace = Estimate.exact(estimator.known, krylov.matvecs, seed)
    elif (over := budget.stop()) is not None:
        trace = Estimate.unknown(over, krylov.matvecs, seed)
    else:
        trace = estimator.refine()
    return trace, estimator.frobenius_norm()
