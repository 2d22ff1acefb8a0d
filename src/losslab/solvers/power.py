"""The eigenpair of largest magnitude by power iteration: no basis to keep, and each call can begin where one ended."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator, require_operator
from losslab.random import gaussian, make_generator
from losslab.ranks import Split
from losslab.solvers.budget import Budget
from losslab.solvers.krylov import basis_dtype, rounding_of
from losslab.status import Progress, Status


@dataclass(frozen=True)
class DominantEigenpair:
    """What one power iteration knows of the eigenvalue of largest magnitude.

    Attributes:
        value: The Rayleigh quotient θ = vᵀAv of the last unit vector v that was multiplied.
        residual: ‖Av − θv‖ of that v, measured.
        error: residual + rounding: *an* eigenvalue of A lies within this distance of the value. Which one it is, no
            product says; from a random start it is that of largest magnitude, sooner or later.
        vector: (n,) ±Av/‖Av‖, one step further than v: a unit vector, the next start.
        matvecs: Products used.
        status: Why the iteration stopped.
    """

    value: float
    residual: float
    error: float
    vector: Tensor
    matvecs: int
    status: Status
    seed: int | None = None

    def __str__(self) -> str:
        return f"{self.value:.6g} ± {self.error:.1g} ({self.matvecs} products, {self.status})"


def power_iteration(
    operator: LinearOperator,
    *,
    start: Tensor | None = None,
    tol: float = 1e-3,
    max_matvecs: int = 100,
    time_budget: float | None = None,
    seed: int | torch.Generator = 0,
    progress: Progress | None = None,
) -> DominantEigenpair:
    """Which eigenvalue of A is largest in magnitude, when a good start is known?  v ← Av/‖Av‖.

    For following an eigenvalue while A changes little from call to call, as along a training run: with the last
    result's `vector` for a start and `max_matvecs=1`, one product gives the Rayleigh quotient, its residual, and the
    next start. Where there is no such start `eigenpairs` needs far fewer products.

    The error falls by |λ₂/λ₁| a product. Where λ₁ and −λ₁ are both eigenvalues the iteration does not converge: the
    residual stays large, and the status is `budget_reached`.

    Args:
        operator: Symmetric n×n.
        start: (n,) any length; moved to the operator's device. Default: a random vector.
        tol: Stop once the residual is at most tol·|θ|.
        max_matvecs: Products at most.
        time_budget: Seconds at most.
        seed: Of the random start; or a generator.
        progress: Called after each product.

    Returns:
        DominantEigenpair. Cost: `matvecs` products, memory four vectors.

    Raises:
        ValueError: tol not above 0, max_matvecs below 1, a start of another shape, zero, or not finite.
    """
    require_operator(operator)
    if not tol > 0:
        raise ValueError(f"tol: expected a number > 0, got {tol!r}")
    vector = _unit_start(operator, gaussian((operator.size,), make_generator(seed)) if start is None else start)
    budget = Budget(max_matvecs, time_budget, progress, ranks=operator.split.ranks)
    known_seed = seed if start is None and isinstance(seed, int) else None
    whole, largest = Split(operator.size), 0.0  # ‖Av‖ met: ‖A‖ from below
    while True:
        product = (operator @ vector).to(vector.dtype)
        length, value = whole.norm(product), float(whole.dots(vector[None], product[None]))
        if not math.isfinite(length):
            budget.spend(1)
            return DominantEigenpair(math.nan, math.inf, math.inf, vector, budget.used, Status.nonfinite, known_seed)
        residual, largest = whole.norm(torch.sub(product, vector, alpha=value)), max(largest, length)
        rounding = rounding_of(operator) * largest
        if length > 0:  # the sign of θ keeps v from turning over where it is negative
            vector = product / math.copysign(length, value)
        budget.spend(1, functools.partial("{:.6g}±{:.0e}".format, value, residual))
        over = Status.converged if residual <= max(tol * abs(value), rounding) else budget.stop()
        if over is not None:
            return DominantEigenpair(value, residual, residual + rounding, vector, budget.used, over, known_seed)


def _unit_start(operator: LinearOperator, start: Tensor) -> Tensor:
    if not isinstance(start, Tensor) or start.shape != (operator.size,):
        got = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
        raise ValueError(f"start: expected a tensor of shape ({operator.size},), got {got}")
    vector = start.to(operator.device, basis_dtype(operator))
    length = Split(operator.size).norm(vector)
    if not math.isfinite(length) or length == 0.0:
        raise ValueError(f"start: expected a finite vector that is not zero, got one of norm {length}")
    return vector / length
