"""How fast does gradient descent go from here, by the quadratic model and in truth?"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losslab.operators.determinism import Evaluation
from losslab.operators.finite_difference import hessian_of
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.base import ProbeResult, summary
from losslab.solvers.budget import Budget
from losslab.solvers.density import extend, quadrature
from losslab.solvers.krylov import Krylov
from losslab.status import Progress, Status, StopRequested

_PARTED = 0.1  # of what the loss was to change by so far: from there on model and truth are told apart


@dataclass(frozen=True)
class ConvergenceResult(ProbeResult):
    """Gradient descent θ ← θ − η∇L for T steps.

    Attributes:
        losses: (T+1,) seen, from the point itself on; NaN from the step on that was not reached or not finite.
        predicted: (T+1,) by the quadratic model, weight by weight.
        linear: (T+1,) by the rate alone: minimum + ρ²ᵗ·(L₀ − minimum).
        minimum: The quadratic model's least loss over the directions that curve upwards; NaN where there is none.
        learning_rate: η.
        top: λ_max, the largest Ritz value, with its error bound `top_error`.
        smallest_positive: μ, the smallest Ritz value above rounding. The true smallest positive eigenvalue may be
            smaller, so κ may be larger and the rate nearer to 1.
        smallest: The smallest Ritz value; where it is negative the quadratic model has no minimum.
        condition_number: κ = λ_max/μ.
        rate: ρ = max |1 − ηλ| over the positive Ritz values: the distance to the minimum falls like ρᵗ, the loss like
            ρ²ᵗ; 1 − μ/λ_max at η = 1/λ_max.
        stable: η < 2/λ_max.
        departs_at: The first step at which loss and prediction differ by more than a tenth of the largest change
            predicted up to there; None if none does.
        exact_steps: Up to this step `predicted` is the quadratic model's own loss, to rounding.
        gradient_norm: ‖∇L‖ at the point.
        matvecs: Products used.
    """

    losses: np.ndarray
    predicted: np.ndarray
    linear: np.ndarray
    minimum: float
    learning_rate: float
    top: float
    top_error: float
    smallest_positive: float
    smallest: float
    condition_number: float
    rate: float
    stable: bool
    departs_at: int | None
    exact_steps: int
    gradient_norm: float
    num_examples: int
    matvecs: int

    def __str__(self) -> str:
        departs = "never left it" if self.departs_at is None else f"left it at step {self.departs_at}"
        rows = {
            "loss": f"{self.losses[0]:.4g} to {self.losses[-1]:.4g} in {len(self.losses) - 1} steps",
            "quadratic model": f"to {self.predicted[-1]:.4g}; the loss {departs}",
            "largest eigenvalue": f"{self.top:.4g} ± {self.top_error:.1g}; "
            f"η = {self.learning_rate:.3g} is {'' if self.stable else 'not '}stable",
            "condition number": f"{self.condition_number:.3g}, down to the eigenvalue {self.smallest_positive:.3g}",
            "rate": f"{self.rate:.6g} a step",
            "cost and status": f"{self.matvecs} products, {self.status}",
        }
        return summary(rows)


def convergence(
    risk: EmpiricalRisk,
    *,
    learning_rate: float | None = None,
    num_steps: int = 100,
    num_nodes: int = 50,
    progress: Progress | None = None,
) -> ConvergenceResult:
    """How fast does gradient descent go from here, by the quadratic model and in truth?

    On the quadratic model L + gᵀd + ½dᵀHd, with the eigenpairs (λᵢ, uᵢ) of H and wᵢ = (uᵢᵀg)², plain gradient descent
    has after t steps exactly the loss

        L_t = L₀ − Σᵢ wᵢ (1 − (1 − ηλᵢ)²ᵗ) / (2λᵢ),

    also where H is singular or indefinite. One Lanczos run started at g gives the λᵢ and wᵢ that matter: the sum is a
    polynomial in λ of degree 2t − 1, which Gauss quadrature with m nodes gives exactly up to t = m (Golub & Meurant
    2010, chapter 6), and nearly beyond where the nodes have found the spectrum's ends. Beside it stands the textbook's
    rate, which knows the ends alone: distances shrink by ρ = max|1 − ηλ| a step, 1 − μ/L at η = 1/L (Nesterov 2004,
    theorem 2.1.15; Boyd & Vandenberghe 2004, section 9.3). Seen is the loss of gradient descent on the same risk; the
    model stays where it is, and BatchNorm keeps the mode and the statistics of the risk.

    Args:
        risk: Where; the model's present parameters are the start.
        learning_rate: η; default 1/λ_max.
        num_steps: T.
        num_nodes: Lanczos steps m at most; memory m × P numbers.
        progress: Called after each product and each step.

    Returns:
        ConvergenceResult. Cost: num_nodes products and num_steps + 1 gradients. At a point whose gradient is zero to
        rounding Lanczos starts from the vector of ones: for κ and the rate.

    Raises:
        ValueError: learning_rate not above 0, or to be chosen where the loss curves nowhere upwards; num_steps or
            num_nodes below 1; loss or gradient not finite at the start.
    """
    require_risk(risk)
    _check(learning_rate, num_steps, num_nodes)
    first = risk.evaluate()
    norm = float(first.gradient.double().norm())
    stationary = norm <= 10 * torch.finfo(risk.dtype).eps * first.gradient_scale
    budget = Budget(num_nodes, progress=progress, expected=num_nodes + num_steps, ranks=risk.ranks)
    krylov = Krylov(hessian_of(risk), torch.ones_like(first.gradient) if stationary else first.gradient, num_nodes)
    status = extend(krylov, num_nodes, budget, lambda: "Lanczos from the gradient")
    eta = _rate_for(krylov) if learning_rate is None else float(learning_rate)
    losses = np.full(num_steps + 1, np.nan)
    losses[0] = first.loss
    if status.ok:
        status = _descend(risk, first, eta, losses, progress, num_nodes)
    rounding = 10 * torch.finfo(risk.dtype).eps * first.loss_scale
    return _result(status, krylov, 0.0 if stationary else norm, eta, losses, rounding, risk.num_examples)


def _rate_for(krylov: Krylov) -> float:
    nodes, _ = quadrature(krylov)
    if len(nodes) and nodes[-1] <= 0:
        raise ValueError("learning_rate: the loss curves nowhere upwards along the gradient, so 1/λ_max is no choice")
    return 1 / float(nodes[-1]) if len(nodes) else math.nan


def _result(
    status: Status, krylov: Krylov, norm: float, eta: float, losses: np.ndarray, rounding: float, num_examples: int
) -> ConvergenceResult:
    nodes, weights = quadrature(krylov) if krylov.size else (np.full(1, np.nan), np.ones(1))
    steps, masses, floor = np.arange(len(losses)), weights * norm**2, krylov.rounding * krylov.norm
    positive = nodes > floor
    rate, smallest, excess = math.nan, math.nan, math.nan
    if positive.any():
        rate, smallest = float(np.abs(1 - eta * nodes[positive]).max()), float(nodes[positive].min())
        excess = float((masses[positive] / (2 * nodes[positive])).sum())
    predicted = losses[0] - decrease(nodes, masses, eta, steps)
    return ConvergenceResult(
        status=status,
        losses=losses,
        predicted=predicted,
        linear=losses[0] - excess * (1 - rate ** (2.0 * steps)),
        minimum=float(losses[0]) - excess,
        learning_rate=eta,
        top=float(nodes[-1]),
        top_error=float(krylov.ritz()[1][-1] + floor) if krylov.size else math.inf,
        smallest_positive=smallest,
        smallest=float(nodes[0]),
        condition_number=float(nodes[-1]) / smallest,
        rate=rate,
        stable=bool(eta * nodes[-1] < 2),
        departs_at=departure(losses, predicted, rounding),
        exact_steps=len(losses) - 1 if krylov.broken else min(krylov.size, len(losses) - 1),
        gradient_norm=norm,
        num_examples=num_examples,
        matvecs=krylov.matvecs,
    )


def decrease(nodes: np.ndarray, masses: np.ndarray, eta: float, steps: np.ndarray) -> np.ndarray:
    """Σᵢ wᵢ (1 − (1 − ηλᵢ)²ᵗ)/(2λᵢ) for each t: nodes λ and masses w (m,), steps t (T,); the term at λ = 0 is wηt.

    >>> decrease(np.array([0.0, 2.0]), np.array([1.0, 4.0]), 0.5, np.array([0, 1, 2]))
    array([0. , 1.5, 2. ])
    """
    x = eta * nodes
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # (1 − x)²ᵗ − 1 without cancellation where x is near zero; |1 − x| beyond 1.
        logs = np.where(x < 1, np.log1p(-np.minimum(x, 1)), np.log(np.abs(1 - x)))
        powers = np.expm1(2 * np.multiply.outer(steps, logs))
        terms = -powers / (2 * nodes)
    terms[steps == 0] = 0.0  # 0·log 0 where ηλ is exactly 1
    return np.where(nodes == 0, eta * np.asarray(steps)[:, None], terms) @ masses


def _descend(
    risk: EmpiricalRisk, first: Evaluation, eta: float, losses: np.ndarray, progress: Progress | None, before: int
) -> Status:
    """Fill `losses` by gradient descent from the model's parameters, up to where it must end."""
    point, gradient, num_steps = risk.space.vector(), first.gradient, len(losses) - 1
    for step in range(1, num_steps + 1):
        point = point - eta * gradient
        found = _finite(risk, point)
        if found is None:
            return Status.nonfinite
        losses[step], gradient = found.loss, found.gradient
        if progress is not None:
            try:
                progress(before + step, before + num_steps, f"step {step}: loss {found.loss:.4g}")
            except StopRequested:
                return Status.stopped if step < num_steps else Status.complete
    return Status.complete


def _finite(risk: EmpiricalRisk, point: Tensor) -> Evaluation | None:
    """Loss and gradient at a point; None where the loss is not finite."""
    try:
        return risk.evaluate(point)
    except ValueError:
        if math.isfinite(risk.loss_at(point)):
            raise
        return None


def departure(losses: np.ndarray, predicted: np.ndarray, rounding: float) -> int | None:
    """The first step at which the two differ by more than a tenth of the largest change predicted up to there."""
    reached = np.isfinite(losses)
    change = np.maximum.accumulate(np.abs(predicted - predicted[0]))
    apart = ~(np.abs(losses - predicted) <= _PARTED * change + rounding) & reached
    return int(apart.argmax()) if apart.any() else None


def _check(learning_rate: float | None, num_steps: int, num_nodes: int) -> None:
    if learning_rate is not None and not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate: expected a finite number > 0 or None, got {learning_rate!r}")
    for name, value in (("num_steps", num_steps), ("num_nodes", num_nodes)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value!r}")
