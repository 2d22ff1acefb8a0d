"""Is the gradient's noise larger than the curvature?"""

from dataclasses import dataclass

from losslab.operators.base import LinearOperator
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.base import ProbeResult
from losslab.solvers.estimate import Eigenpairs
from losslab.solvers.lanczos import eigenpairs
from losslab.status import Progress, worst


@dataclass(frozen=True)
class NoiseResult(ProbeResult):
    """λ_C, the top eigenvalue of the per-example gradient covariance, λ_H, that of the Hessian, and λ_C/λ_H."""

    covariance_top: float
    covariance_error: float
    hessian_top: float
    hessian_error: float
    ratio: float
    num_examples: int
    matvecs: int
    seed: int | None


def gradient_noise(
    risk: EmpiricalRisk, *, tol: float = 1e-3, seed: int = 0, progress: Progress | None = None
) -> NoiseResult:
    """How noisy is one example's gradient, measured by the curvature?  λ_max(C)/λ_max(H).

    C = (1/N) Σᵢ gᵢgᵢᵀ − ḡḡᵀ is the covariance of per-example gradients, used through its products only. The noise of a
    batch of B examples is C/B. The ratio has the unit of the loss: compare networks trained with the same loss by it.
    For log-likelihood losses it is near 1 where the predicted probabilities are calibrated (C is then the Fisher
    matrix, and nearly H), and falls towards 0 where a network has learnt its training examples by heart.

    Args:
        risk: Where.
        tol: Relative residual for both eigenvalues.
        seed: Of the start vectors.
        progress: Called after each product.

    Returns:
        NoiseResult, errors as bounds on the two eigenvalues. Cost: 10 to 30 products in all.

    Raises:
        ValueError: The loss mixes examples (`GradientCovariance`).
    """

    def half(offset: float) -> Progress | None:
        if progress is None:
            return None
        return lambda done, total, note: progress(offset + min(done / 30, 1.0), 2.0, note)

    def top(operator: LinearOperator, offset: float) -> Eigenpairs:
        return eigenpairs(operator, which="largest", tol=tol, vectors=False, seed=seed, progress=half(offset))

    covariance, hessian = top(GradientCovariance(risk), 0), top(Hessian(risk), 1)
    top_c, top_h = float(covariance.values[0]), float(hessian.values[0])
    return NoiseResult(
        status=worst(covariance.status, hessian.status),
        covariance_top=top_c,
        covariance_error=float(covariance.errors[0]),
        hessian_top=top_h,
        hessian_error=float(hessian.errors[0]),
        ratio=top_c / top_h if top_h else float("inf"),
        num_examples=risk.num_examples,
        matvecs=covariance.matvecs + hessian.matvecs,
        seed=seed,
    )
