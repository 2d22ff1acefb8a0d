"""What solvers return: numbers with their errors, their cost and why they stopped. Never bare numbers."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losslab.status import Status


def judge(value: float, error: float, tol: float) -> Status:
    """Not finite, converged (error ≤ tol·|value|), or `budget_reached`, which an estimate is until it converges."""
    if not math.isfinite(value):
        return Status.nonfinite
    return Status.converged if error == 0 or error <= tol * abs(value) else Status.budget_reached  # tol may be ∞


@dataclass(frozen=True)
class Estimate:
    """A random estimate: value ± standard_error (one standard deviation of the mean over `num_samples`)."""

    value: float
    standard_error: float
    num_samples: int
    matvecs: int
    status: Status
    seed: int | None = None

    @classmethod
    def judged(
        cls, value: float, standard_error: float, num_samples: int, matvecs: int, tol: float, seed: int | None
    ) -> "Estimate":
        """With the status that `judge` gives it."""
        return cls(value, standard_error, num_samples, matvecs, judge(value, standard_error, tol), seed)

    @classmethod
    def mean(cls, samples: Tensor, matvecs: int, tol: float, seed: int | None, known: float = 0.0) -> "Estimate":
        """Of independent samples, on top of what is known exactly."""
        error = float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.inf
        return cls.judged(known + float(samples.mean()), error, len(samples), matvecs, tol, seed)

    @classmethod
    def unknown(cls, status: Status, matvecs: int, seed: int | None) -> "Estimate":
        """Nothing could be computed: NaN ± ∞."""
        return cls(math.nan, math.inf, 0, matvecs, status, seed)

    @classmethod
    def exact(cls, value: float, matvecs: int, seed: int | None) -> "Estimate":
        """From an invariant subspace that is the whole space: no sampling error."""
        return cls(value, 0.0, 0, matvecs, Status.breakdown if math.isfinite(value) else Status.nonfinite, seed)

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.standard_error:.2g} ({self.num_samples} samples, {self.status})"


@dataclass(frozen=True)
class DiagonalEstimate:
    """A random estimate of a matrix's diagonal.

    Attributes:
        values: (n,) float64, on the operator's device.
        standard_error: (n,) of each entry: one standard deviation.
        num_samples: Independent (XDiag: exchangeable) samples that both are taken over.
        matvecs: Products used.
        status: Converged where `relative_error` is at most the tolerance.
    """

    values: Tensor
    standard_error: Tensor
    num_samples: int
    matvecs: int
    status: Status
    seed: int | None = None

    @classmethod
    def judged(
        cls, values: Tensor, standard_error: Tensor, num_samples: int, matvecs: int, tol: float, seed: int | None
    ) -> "DiagonalEstimate":
        """With the status that `judge` gives the norms of both."""
        norm, error = (float(torch.linalg.vector_norm(x)) for x in (values, standard_error))
        return cls(values, standard_error, num_samples, matvecs, judge(norm, error, tol), seed)

    @classmethod
    def exact(cls, values: Tensor, matvecs: int, seed: int | None) -> "DiagonalEstimate":
        """From a basis of the whole space: no sampling error."""
        status = Status.breakdown if values.isfinite().all() else Status.nonfinite
        return cls(values, torch.zeros_like(values), 0, matvecs, status, seed)

    @property
    def relative_error(self) -> float:
        """‖standard_error‖/‖values‖."""
        error, norm = (float(torch.linalg.vector_norm(x)) for x in (self.standard_error, self.values))
        return error / norm if norm else error

    def __str__(self) -> str:
        return f"{len(self.values)} entries ± {self.relative_error:.2g} ({self.num_samples} samples, {self.status})"


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
        standard_error: (G,) of that mean, over the choice of random vectors.
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

    def __str__(self) -> str:
        low, high = (self.grid[0], self.grid[-1]) if len(self.grid) else (math.nan, math.nan)
        probes = f"{self.num_probes} probes, {self.matvecs} products, {self.status}"
        return f"{len(self.grid)} points from {low:.4g} to {high:.4g}, smoothed by {self.width:.2g} ({probes})"
