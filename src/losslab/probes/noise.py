"""How noisy is one example's gradient, beside the curvature and beside the gradient itself?"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.operators.finite_difference import hessian_of
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.base import ProbeResult, summary
from losslab.probes.gradient_moments import GradientMoments, gradient_moments
from losslab.probes.noise_scale import NoiseScale, noise_scale
from losslab.solvers.estimate import Eigenpairs
from losslab.solvers.lanczos import eigenpairs
from losslab.status import Progress, Stages, Status, StopRequested, worst

_GROUPS = 16  # random groups of examples behind the standard errors
_MOMENTS = 6  # in products, about: for the progress only
_EXPECTED_MATVECS = 30  # for the progress only


@dataclass(frozen=True)
class NoiseResult(ProbeResult):
    """The noise of one example's gradient; a batch of B examples has C/B.

    Attributes:
        covariance_top: λ_C, the top eigenvalue of the per-example gradient covariance C, with its error bound.
        hessian_top: λ_H, that of the Hessian, with its error bound.
        ratio: λ_C/λ_H, with `ratio_error` from both bounds; NaN where both are zero.
        covariance_trace: tr C, exact on these examples.
        gradient_square: ‖ḡ‖², exact on these examples.
        noise_scale: tr Σ/‖G‖² of the distribution that these examples are drawn from.
        noise_scale_here: tr C/‖ḡ‖², the same if these examples were all there are.
        alignment: |cos| between the top eigenvectors of C and H; NaN where a top eigenvalue is zero.
        overlap: ‖V_Cᵀ V_H‖_F²/k of the top-k eigenvectors: 1 for one subspace, k/P by chance; NaN likewise.
        tensors: Names of the parameter tensors.
        tensor_signal: (T,) ‖ḡ‖² of each tensor's part.
        tensor_noise: (T,) tr C of each tensor's part.
        tensor_signal_to_noise: (T,) their ratio; about 1/N where there is noise only, NaN where a gradient is zero.
        matvecs: Products.
    """

    covariance_top: float
    covariance_error: float
    hessian_top: float
    hessian_error: float
    ratio: float
    ratio_error: float
    covariance_trace: float
    gradient_square: float
    noise_scale: NoiseScale
    noise_scale_here: float
    alignment: float
    overlap: float
    k: int
    tensors: tuple[str, ...]
    tensor_signal: np.ndarray
    tensor_noise: np.ndarray
    tensor_signal_to_noise: np.ndarray
    num_examples: int
    num_parameters: int
    matvecs: int
    seed: int | None

    def __str__(self) -> str:
        rows = {
            "gradient covariance": f"top {self.covariance_top:.4g} ± {self.covariance_error:.1g}, "
            f"trace {self.covariance_trace:.4g}",
            "Hessian": f"top {self.hessian_top:.4g} ± {self.hessian_error:.1g}",
            "ratio": f"{self.ratio:.4g} ± {self.ratio_error:.1g}",
            "noise scale": f"{self.noise_scale} examples, {self.noise_scale_here:.4g} of these alone",
            "alignment": f"{self.alignment:.3f} of the top eigenvectors, {self.overlap:.3f} of the first {self.k}",
            "cost and status": f"{self.matvecs} products, {self.status}",
        }
        return summary(rows)


def gradient_noise(
    risk: EmpiricalRisk, *, k: int = 1, tol: float = 1e-3, seed: int = 0, progress: Progress | None = None
) -> NoiseResult:
    """How noisy is one example's gradient?  λ_max(C)/λ_max(H), tr C/‖g‖², and where the noise lies.

    C = (1/N) Σᵢ gᵢgᵢᵀ − ḡḡᵀ is the covariance of per-example gradients, used through its products only; its trace and
    each tensor's share of it are exact, from the gradients one by one.

    - The ratio λ_C/λ_H has the unit of the loss: compare networks trained with the same loss by it. For log-likelihood
      losses it is near 1 where the predicted probabilities are calibrated (C is then the Fisher matrix, and nearly H),
      and falls towards 0 where a network has learnt its training examples by heart.
    - The noise scale tr Σ/‖G‖² is the batch size at which noise and gradient are equally long; far below it batches
      twice as large save half the steps, far above it hardly any (McCandlish et al. 2018, B_simple). By the unbiased
      two-batch estimator, of which `noise_scale_here` is the biased version. It takes the examples for a fresh sample:
      where θ is a minimum of their own loss, ḡ = 0 and the estimate of ‖G‖² is −tr Σ/N.
    - Where λ₁ and λ₂ are close the top eigenvector is any mixture of two: read the overlap of larger k then.

    Args:
        risk: Where.
        k: Eigenvectors whose subspaces are compared.
        tol: Relative residual for the eigenvalues of both; angles are known to about tol·λ₁/(λ₁ − λ₂).
        seed: Of start vectors and random groups.
        progress: Called after each product, and each batch of gradients.

    Returns:
        NoiseResult. Cost: 10 to 30 products in all for k = 1, and one pass of gradients one by one
        (`gradient_moments`); memory 16 vectors.

    Raises:
        ValueError: The loss mixes examples (`GradientCovariance`), k out of range.
    """
    require_risk(risk)
    stages = Stages(progress, _MOMENTS + 2 * _EXPECTED_MATVECS)

    def top(operator: LinearOperator) -> Eigenpairs:
        tick = stages.stage(_EXPECTED_MATVECS, expected=_EXPECTED_MATVECS)
        return eigenpairs(operator, k, which="largest", tol=tol, seed=seed, progress=tick)

    covariance = GradientCovariance(risk)
    moments, status = _moments(risk, seed, stages.stage(_MOMENTS))
    pairs_c, pairs_h = top(covariance), top(hessian_of(risk))
    top_c, top_h = float(pairs_c.values[0]), float(pairs_h.values[0])
    error_c, error_h = float(pairs_c.errors[0]), float(pairs_h.errors[0])
    ratio = top_c / top_h if top_h else math.inf if top_c else math.nan
    alignment, overlap = _angles(pairs_c.vectors, pairs_h.vectors) if top_c and top_h else (math.nan, math.nan)
    noise, signal = _by_tensor(moments, risk)
    with np.errstate(divide="ignore", invalid="ignore"):
        here, by_tensor = np.divide(noise.sum(), signal.sum()), signal / noise
    return NoiseResult(
        status=worst(pairs_c.status, pairs_h.status, status),
        covariance_top=top_c,
        covariance_error=error_c,
        hessian_top=top_h,
        hessian_error=error_h,
        ratio=ratio,
        ratio_error=(error_c + abs(ratio) * error_h) / abs(top_h) if top_h else math.inf,  # to first order
        covariance_trace=float(noise.sum()),
        gradient_square=float(signal.sum()),
        noise_scale=noise_scale(moments) if moments else NoiseScale(*[math.nan] * 6),
        noise_scale_here=float(here),
        alignment=alignment,
        overlap=overlap,
        k=k,
        tensors=risk.space.names,
        tensor_signal=signal,
        tensor_noise=noise,
        tensor_signal_to_noise=by_tensor,
        num_examples=risk.num_examples,
        num_parameters=risk.space.size,
        matvecs=pairs_c.matvecs + pairs_h.matvecs,
        seed=seed,
    )


def _moments(risk: EmpiricalRisk, seed: int, progress: Progress | None) -> tuple[GradientMoments | None, Status]:
    """None where it was told to stop: a part of the examples has no moments."""
    try:
        return gradient_moments(risk, min(_GROUPS, risk.num_examples), seed, progress), Status.complete
    except StopRequested:
        return None, Status.stopped


def _by_tensor(moments: GradientMoments | None, risk: EmpiricalRisk) -> tuple[np.ndarray, np.ndarray]:
    """Noise tr C and signal ‖ḡ‖² of each parameter tensor."""
    if moments is None:
        unknown = np.full(len(risk.space.names), math.nan)
        return unknown, unknown
    signal = moments.tensor_means.numpy()
    return np.maximum(moments.tensor_squares.numpy() / risk.num_examples - signal, 0.0), signal  # rounding


def _angles(first: Tensor | None, second: Tensor | None) -> tuple[float, float]:
    """|cos| between the first columns of both, and the overlap of all; both (P, k) with orthonormal columns."""
    assert first is not None
    assert second is not None
    cosines = (first.double().mT @ second.double()).cpu()
    return float(cosines[0, 0].abs()), float(torch.sum(cosines**2) / len(cosines))
