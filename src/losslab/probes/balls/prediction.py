"""What a solution's gradient and Hessian predict for the loss nearby."""

import math
from dataclasses import dataclass

from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.operators.finite_difference import hessian_of
from losslab.operators.rescaled import Rescaled
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.balls.neighbourhood import Neighbourhood
from losslab.solvers.lanczos import eigenpairs
from losslab.solvers.trace import trace
from losslab.status import Progress, Status

EXPECTED_MATVECS = 15  # of an eigenvalue to this tolerance at a trained network; for the progress only
_EIGENVALUE_TOL, _TRACE_TOL, _TRACE_MATVECS = 1e-2, 0.05, 48


@dataclass(frozen=True)
class Prediction:
    """The rise of the loss by the terms of first and of second order, each taken alone.

    Attributes:
        first_order: max gᵀδ over the neighbourhood.
        quadratic: ½ρ²·λ_max, or ½σ²·tr, of DHD with D = diag(c); NaN where there is no formula.
        error: Of `quadratic`: the eigenvalue's error bound, or the trace's standard error.
        direction: The η that attains ½ρ²·λ_max, (P,).
        matvecs: Products used.
        status: Why the solver stopped.
    """

    first_order: float = math.nan
    quadratic: float = math.nan
    error: float = math.nan
    direction: Tensor | None = None
    matvecs: int = 0
    status: Status = Status.complete


def predict(
    risk: EmpiricalRisk, around: Neighbourhood, *, average: bool, seed: int, progress: Progress | None = None
) -> Prediction:
    """How high should the loss rise, were it quadratic?  Worst case ½ρ²·λ_max(DHD), or average ½σ²·tr(DHD).

    Over the box ‖η‖_∞ ≤ ρ the worst case of a quadratic has no formula (it is NP-hard to find): NaN.

    Returns:
        Prediction. Cost: one gradient, and 5 to 15 products for the eigenvalue to 1 %, or up to 48 for the trace to
        5 %.
    """
    try:
        first = around.first_order(risk.gradient())
    except ValueError:  # NaN or Inf in the gradient, where the loss may still be finite
        return Prediction(status=Status.nonfinite)
    if around.norm == "linf" and not average:
        return Prediction(first)
    hessian: LinearOperator = hessian_of(risk)
    if bool((around.scale != 1).any()):
        hessian = Rescaled(hessian, around.scale)
    if average:
        found = trace(hessian, tol=_TRACE_TOL, max_matvecs=_TRACE_MATVECS, seed=seed, progress=progress)
        half = 0.5 * around.variance
        value, error = half * found.value, half * found.standard_error
        return Prediction(first, value, error, None, found.matvecs, found.status)
    pairs = eigenpairs(hessian, which="largest", tol=_EIGENVALUE_TOL, seed=seed, progress=progress)
    assert pairs.vectors is not None
    top, half = float(pairs.values[0]), 0.5 * around.radius**2
    rise = half * top if not top < 0 else 0.0  # downhill all around: highest where it stands
    direction = around.radius * pairs.vectors[:, 0].to(around.centre)
    return Prediction(first, rise, half * float(pairs.errors[0]), direction, pairs.matvecs, pairs.status)
