"""The Frobenius norm from the lengths of products."""

import math

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.solvers.estimate import Estimate
from losslab.solvers.estimator import Estimator, run
from losslab.status import Progress


class FrobeniusNorm(Estimator[Estimate]):
    """‖A‖_F² = E[‖Az‖²] for random signs z: Hutchinson's estimator of tr A². Memory: a block of vectors."""

    samples = torch.empty(0, dtype=torch.float64)

    def add(self, vectors: Tensor) -> Estimate:
        """One sample a vector."""
        products = self.multiply(vectors)
        self.samples = torch.cat([self.samples, self.dots(products, products)])
        square = Estimate.mean(self.samples, self.budget.used, self.tol, self.seed)
        norm = math.sqrt(square.value)
        error = square.standard_error / (2 * norm) if norm else square.standard_error
        return Estimate.judged(norm, error, square.num_samples, square.matvecs, self.tol, self.seed)


def frobenius_norm(
    operator: LinearOperator,
    *,
    tol: float = 0.05,
    max_matvecs: int = 96,
    time_budget: float | None = None,
    seed: int | torch.Generator = 0,
    vectors: Tensor | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """How large is A in all?  ‖A‖_F = (Σ λ_i²)^½ = (E‖Az‖²)^½ over random signs z.

    ‖Az‖² is without bias for ‖A‖_F², with a standard deviation of at most √2·‖A²‖_F ≤ √2·‖A‖_F². The norm's error is
    that of the square by first order, Δ‖A‖_F = Δ(‖A‖_F²)/(2‖A‖_F); its own bias, −(Δ‖A‖_F)²/(2‖A‖_F), is of second.

    Args:
        operator: Symmetric n×n.
        tol: Stop once the standard error is below tol·‖A‖_F.
        max_matvecs: Products at most, 16 or more.
        time_budget: Seconds at most; looked at after each block of 8 products.
        seed: Of the vectors; or a generator.
        vectors: (s, n) vectors of one's own with E[zzᵀ] = I, signs or Gaussian; all of them are used, and nothing else.
        progress: Called after each block of products.

    Returns:
        Estimate with its standard error; `budget_reached` if that is above tol·‖A‖_F.

    Raises:
        ValueError: tol not above 0, max_matvecs below 16, vectors of another shape.

    >>> from losslab.operators.dense import DenseOperator
    >>> frobenius_norm(DenseOperator(torch.diag(torch.tensor([3.0, -4.0])))).value
    5.0
    """
    return run(FrobeniusNorm, operator, tol, max_matvecs, time_budget, seed, vectors, progress)
