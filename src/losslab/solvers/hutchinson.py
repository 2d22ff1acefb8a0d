"""Hutchinson's estimators: the trace from zᵀAz (1990), the diagonal from z ∘ Az (Bekas, Kokiopoulou & Saad 2007)."""

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.solvers.budget import Budget
from losslab.solvers.estimate import DiagonalEstimate, Estimate
from losslab.solvers.estimator import BLOCK, Estimator, Moments


class Hutchinson(Estimator[Estimate]):
    """tr A = E[zᵀAz] for random signs z: variance 2(‖A‖_F² − Σ A_ii²) a sample. Memory: a block of vectors."""

    samples = torch.empty(0, dtype=torch.float64)

    def add(self, vectors: Tensor) -> Estimate:
        """One sample a vector."""
        self.samples = torch.cat([self.samples, self.dots(vectors, self.multiply(vectors))])
        return Estimate.mean(self.samples, self.budget.used, self.tol, self.seed)


class HutchinsonDiagonal(Estimator[DiagonalEstimate]):
    """A_ii = E[z_i (Az)_i] for random signs z: variance Σ_j≠i A_ij² a sample. Memory: a block, and 2n numbers."""

    def __init__(
        self, operator: LinearOperator, tol: float, budget: Budget, generator: torch.Generator, seed: int | None = None
    ):
        super().__init__(operator, tol, budget, generator, seed)
        self.moments = Moments()

    def add(self, vectors: Tensor) -> DiagonalEstimate:
        """One sample a vector."""
        for block in vectors.split(BLOCK):
            self.moments.add(block.double() * self.multiply(block).double())
        mean, error = (self.split.whole(x) for x in (self.moments.mean, self.moments.standard_error()))
        return DiagonalEstimate.judged(mean, error, self.moments.count, self.budget.used, self.tol, self.seed)
