"""Linear systems (A + λI)x = b by conjugate gradients (Hestenes & Stiefel 1952)."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losslab.operators.base import LinearOperator, require_operator
from losslab.operators.symmetry import require_symmetric
from losslab.solvers.budget import Budget
from losslab.solvers.krylov import basis_dtype, rounding_of
from losslab.status import Progress, Status, worst

Preconditioner = LinearOperator | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearSolution:
    """x with (A + λI)x ≈ b, for each of k right-hand sides.

    Attributes:
        x: (n,) or (n, k), as b; the last iterate, whatever the status.
        residuals: (k,) ‖b − (A + λI)x‖/‖b‖, by a product of its own at the end. ‖x − x*‖ is at most
            residual·‖b‖/(λ_min(A) + λ).
        converged: (k,) residual ≤ tol.
        curvature: The smallest pᵀAp/pᵀp of a direction p that was met, so that λ_min(A) is not above it; infinite
            where there was none. With the status `indefinite`, λ must be more than −curvature, and may have to be more.
        matvecs: Products used.
        status: Why the solver stopped, for the worst of the right-hand sides.
    """

    x: Tensor
    residuals: np.ndarray
    converged: np.ndarray
    curvature: float
    matvecs: int
    status: Status

    def __str__(self) -> str:
        needed = f", shift must be above {-self.curvature:.3g}" if self.status is Status.indefinite else ""
        return f"residual {self.residuals.max():.1e} ({self.matvecs} products, {self.status}{needed})"


def conjugate_gradients(
    operator: LinearOperator,
    b: Tensor,
    *,
    shift: float = 0.0,
    preconditioner: Preconditioner | None = None,
    start: Tensor | None = None,
    tol: float = 1e-5,
    max_matvecs: int | None = None,
    time_budget: float | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> LinearSolution:
    """Which x solves (A + λI)x = b?

    Several right-hand sides are solved side by side: each has its own conjugate gradients, all share the passes over
    the data, and those that are done take no more products. Scalars are float64. What the recurrence claims is checked
    against b − (A + λI)x; if rounding made them differ, the iteration starts again from there.

    Args:
        operator: Symmetric n×n, such that A + λI is positive definite; else the status is `indefinite`.
        b: (n,) or (n, k).
        shift: λ.
        preconditioner: M ≈ (A + λI)⁻¹, symmetric positive definite: an operator, or a function of (n, k) to (n, k).
        start: A first guess in the shape of b; costs one product for each right-hand side.
        tol: Relative residual to stop at.
        max_matvecs: Products at most, of all right-hand sides together; default 200 for each.
        time_budget: Seconds at most; the last residual is computed all the same.
        check: Refuse an operator that is not symmetric, by two products.
        progress: Called after each pass.

    Returns:
        LinearSolution. Cost: one product an iteration and right-hand side, and one for the last residual; about
        √κ·log(2/tol)/2 iterations at a condition number κ. Memory five times b.

    Raises:
        ValueError: b or start of another shape or not finite; tol, shift or max_matvecs out of range; an operator
            that is not symmetric; a preconditioner that is not positive definite.
        TypeError: A preconditioner that is neither an operator nor a function.
    """
    require_operator(operator)
    if not tol > 0 or not math.isfinite(shift):
        raise ValueError(f"tol, shift: expected tol > 0 and a finite shift, got {tol!r} and {shift!r}")
    if not (preconditioner is None or callable(preconditioner) or isinstance(preconditioner, LinearOperator)):
        raise TypeError(f"preconditioner: expected an operator or a function, got {type(preconditioner).__name__}")
    columns = _columns(operator, b, "b", None)
    guess = None if start is None else _columns(operator, start, "start", b.shape)
    count = columns.shape[1]
    least = (2 if start is None else 3) * count + (2 if check else 0)
    max_matvecs = 200 * count if max_matvecs is None else max_matvecs
    if max_matvecs < least:
        raise ValueError(f"max_matvecs: expected at least {least}, for one iteration and its check, got {max_matvecs}")
    budget = Budget(max_matvecs, time_budget, progress, ranks=operator.split.ranks)
    if check:
        require_symmetric(operator)
        budget.spend(2, "symmetric")
    system = _System(operator, columns, guess, shift, preconditioner, tol, budget)
    statuses = system.solve()
    residuals = system.relative.numpy()
    status = worst(Status.converged, *statuses)
    return LinearSolution(system.x.reshape(b.shape), residuals, residuals <= tol, system.curvature, budget.used, status)


class _System:
    """The right-hand sides, their present x and residuals r, and what is known of A."""

    def __init__(
        self,
        operator: LinearOperator,
        b: Tensor,
        start: Tensor | None,
        shift: float,
        preconditioner: Preconditioner | None,
        tol: float,
        budget: Budget,
    ):
        self.operator, self.b, self.shift, self.budget = operator, b, shift, budget
        self.preconditioner, self.tol = preconditioner, tol
        self.lengths = _dots(b, b).sqrt()
        self.curvature, self.norm = math.inf, 0.0
        every = list(range(b.shape[1]))
        self.relative = torch.ones_like(self.lengths)
        self.x, self.r = torch.zeros_like(b), b.clone()
        if start is not None:
            self.x = torch.where(self.lengths.to(b) > 0, start, 0.0)
            self._measure(every)
        self._update(every)

    def solve(self) -> list[Status]:
        """Sweeps of conjugate gradients, each from true residuals, as long as they halve what is above tol."""
        statuses = [Status.converged] * len(self.lengths)
        todo = self._above(range(len(statuses)))
        while todo:
            before = self.relative.clone()
            ended, moved = self._sweep(todo)
            self._measure(moved)
            for column, status in ended.items():
                statuses[column] = status
            above = self._above(column for column in todo if ended[column] is Status.converged)
            todo = [column for column in above if self.relative[column] <= 0.5 * before[column]]
            for column in set(above) - set(todo):
                statuses[column] = Status.stagnated
        return statuses

    def _sweep(self, todo: list[int]) -> tuple[dict[int, Status], list[int]]:
        """Conjugate gradients on these columns until the recurrence says that each met tol, or it failed.

        Returns why each ended, and those whose x has changed. Products for their true residuals are left over.
        """
        ended: dict[int, Status] = {}
        live, p, rho = todo, torch.zeros_like(self.r[:, todo]), torch.full((len(todo),), math.inf, dtype=torch.float64)
        began = self.budget.used
        while live:
            over = self.budget.stop()
            if over is None and self.budget.left < len(live) + len(todo):
                over = Status.budget_reached
            if over is not None:
                return ended | dict.fromkeys(live, over), todo if self.budget.used > began else []
            z = self._preconditioned(self.r[:, live])
            last, rho = rho, _dots(self.r[:, live], z)
            p = z + p * (rho / last).to(z)  # the first time p = z
            now = self._advance(live, p, rho)
            ended |= {column: status for column, status in zip(live, now, strict=True) if status is not None}
            stay = [i for i, status in enumerate(now) if status is None]
            live, p, rho = [live[i] for i in stay], p[:, stay], rho[stay]
        return ended, todo

    def _advance(self, live: list[int], p: Tensor, rho: Tensor) -> list[Status | None]:
        """One step of x and r along p; why a column ends, or None."""
        q = self._product(p)
        squares, curvatures, lengths = _dots(p, p), _dots(p, q), _dots(q, q).sqrt()
        finite = torch.isfinite(lengths)
        quotients = torch.where(finite, curvatures / squares, math.inf)
        self.curvature = min(self.curvature, float(quotients.min()) - self.shift)
        self.norm = max(self.norm, float(torch.where(finite, lengths / squares.sqrt(), 0.0).max()))
        # Curvature within rounding of ‖A‖ is none: in a null space it has either sign by chance.
        definite = finite & (quotients > rounding_of(self.operator) * self.norm)
        alpha = torch.where(definite, rho / curvatures, 0.0).to(p)
        self.x[:, live] += alpha * p
        self.r[:, live] -= torch.where(alpha > 0, alpha * q, 0.0)
        self._update(live)
        met = (self.relative[live] <= self.tol).tolist()
        kinds = zip(finite.tolist(), definite.tolist(), met, strict=True)
        return [
            (Status.converged if done else None) if right else Status.indefinite if known else Status.nonfinite
            for known, right, done in kinds
        ]

    def _measure(self, columns: list[int]) -> None:
        """The true residuals of these columns, by one product each."""
        if columns:
            self.r[:, columns] = self.b[:, columns] - self._product(self.x[:, columns])
            self._update(columns)

    def _update(self, columns: list[int]) -> None:
        r, lengths = self.r[:, columns], self.lengths[columns]
        self.relative[columns] = torch.where(lengths > 0, _dots(r, r).sqrt() / lengths, 0.0)

    def _above(self, columns: Iterable[int]) -> list[int]:
        return [column for column in columns if not self.relative[column] <= self.tol]

    def _product(self, matrix: Tensor) -> Tensor:
        product = self.operator.matmat(matrix).to(matrix.dtype) + self.shift * matrix
        self.budget.spend(matrix.shape[1], f"residual {float(self.relative.max()):.1e}")
        return product

    def _preconditioned(self, r: Tensor) -> Tensor:
        apply = self.preconditioner
        if apply is None:
            return r
        z = apply @ r if isinstance(apply, LinearOperator) else apply(r)
        if not isinstance(z, Tensor) or z.shape != r.shape:
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"preconditioner: expected a result of shape {tuple(r.shape)}, got {got}")
        if not (_dots(r, z) > 0).all():
            raise ValueError("preconditioner: expected a positive definite one, got rᵀMr <= 0; leave it out")
        return z.to(r)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """The dot product of each pair of columns, summed in float64; on the host."""
    return torch.sum(left * right, dim=0, dtype=torch.float64).cpu()


def _columns(operator: LinearOperator, given: Tensor, name: str, shape: torch.Size | None) -> Tensor:
    """(n, k) on the operator's device, in at least float32."""
    fits = isinstance(given, Tensor) and given.ndim in (1, 2) and len(given) == operator.size and given.numel() > 0
    if not fits or (shape is not None and given.shape != shape):
        expected = f"({operator.size},) or ({operator.size}, k)" if shape is None else f"{tuple(shape)} as b"
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{name}: expected a tensor of shape {expected}, got {got}")
    columns = given.to(operator.device, basis_dtype(operator)).reshape(operator.size, -1)
    if not torch.isfinite(columns).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or Inf")
    return columns
