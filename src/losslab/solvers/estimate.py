"""What solvers return: numbers with their errors, their cost and why they stopped. Never bare numbers."""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from losslab.status import Status


@dataclass(frozen=True)
class Estimate:
    """A random estimate: value ± standard_error (one standard deviation of the mean over `num_samples`)."""

    value: float
    standard_error: float
    num_samples: int
    matvecs: int
    status: Status
    seed: int | None = None

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.standard_error:.2g} ({self.num_samples} samples, {self.status})"


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues with their error bounds.

    Attributes:
        values: (k,) float64, in the order asked for.
        residuals: (k,) ‖Av − θv‖ of each pair, from the recurrence (|β s_mi|): 0 after a breakdown.
        errors: (k,) error bounds: an eigenvalue lies within residual + rounding of the value. The sharper r²/gap
            (Kato–Temple) needs the gap to the nearest other *eigenvalue*; with the nearest Ritz value's instead, it was
            too small by up to 10⁵ where two eigenvalues lie close together.
        converged: (k,) bool, residual ≤ tol·|θ|, or (for eigenvalues near zero) down to the rounding of ‖A‖.
        vectors: (n, k), unit columns, or None if they were not asked for.
        matvecs: Products used.
        status: Why the solver stopped.
        basis_bytes: Memory that the Krylov basis took.
    """

    values: np.ndarray
    residuals: np.ndarray
    errors: np.ndarray
    converged: np.ndarray
    vectors: Tensor | None
    matvecs: int
    status: Status
    basis_bytes: int
    seed: int | None = None

    def __str__(self) -> str:
        pairs = ", ".join(f"{v:.6g} ± {e:.1g}" for v, e in zip(self.values, self.errors, strict=True))
        return f"[{pairs}] ({self.matvecs} products, {self.status})"


@dataclass(frozen=True)
class Density:
    """The eigenvalue density ρ(λ), ∫ρ = 1, seen through a Gaussian of standard deviation `width`.

    Attributes:
        grid: (G,) λ.
        density: (G,) mean over probes.
        standard_error: (G,) of that mean; NaN with a single probe.
        nodes: (N,) quadrature nodes of all probes together.
        weights: (N,) their weights, which sum to 1.
        width: Standard deviation of the kernel, in units of λ.
        num_probes: How many random start vectors.
        matvecs: Products used.
        status: Why the solver stopped.
    """

    grid: np.ndarray
    density: np.ndarray
    standard_error: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray
    width: float
    num_probes: int
    matvecs: int
    status: Status
    seed: int | None = None

    def mass(self, low: float, high: float) -> float:
        """The fraction of eigenvalues in [low, high], by the quadrature (no smoothing)."""
        return float(self.weights[(self.nodes >= low) & (self.nodes <= high)].sum()) if len(self.nodes) else math.nan
