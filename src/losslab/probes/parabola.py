"""A parabola through losses on a line, and how far the true one holds."""

import math
from dataclasses import dataclass

import numpy as np

_DEGREE = 3  # with the cubic term, so that a lopsided valley does not pass for another curvature
_DEVIATION = 0.1  # of the quadratic term: from there on the quadratic model no longer holds


@dataclass(frozen=True)
class Fit:
    """The second derivative at ε = 0 by least squares, with its standard error; `rounding` is what that is at least."""

    curvature: float
    error: float
    rounding: float


def fit(epsilons: np.ndarray, losses: np.ndarray, precision: float) -> Fit:
    """L ≈ c₀ + c₁ε + ½c₂ε² + c₃ε³ by least squares over all points; c₂ and its standard error.

    The error is that of the residuals, or of rounding (`precision`, relative to the largest loss) where that is larger.

    Returns:
        Fit; NaN where fewer than five losses are finite.
    """
    known = np.isfinite(losses)
    width = float(np.abs(epsilons[known]).max(initial=0.0))
    if known.sum() <= _DEGREE + 1 or not width > 0:
        return Fit(math.nan, math.nan, math.nan)
    design = np.vander(epsilons[known] / width, _DEGREE + 1, increasing=True)
    coefficients, *_ = np.linalg.lstsq(design, losses[known], rcond=None)
    residual = losses[known] - design @ coefficients
    scatter = math.sqrt(float(residual @ residual) / (len(residual) - _DEGREE - 1))
    rounding = precision * float(np.abs(losses[known]).max())
    spread = 2 * math.sqrt(float(np.linalg.inv(design.T @ design)[2, 2])) / width**2
    return Fit(2 * float(coefficients[2]) / width**2, max(scatter, rounding) * spread, rounding * spread)


def valid_to(epsilons: np.ndarray, losses: np.ndarray, slope: float, curvature: float, precision: float) -> float:
    """The largest ε up to which, on both sides, |L − (L₀ + cε + ½λε²)| is below a tenth of ½|λ|ε².

    Rounding (`precision`, relative to the largest loss) does not count as a deviation. 0 where the first points
    deviate already.

    Args:
        epsilons: (E,) symmetric, with 0 among them.
        losses: (E,)
        slope: c, the derivative at 0.
        curvature: λ, the second derivative at 0.
        precision: Relative rounding error of a loss.
    """
    quadratic = 0.5 * curvature * epsilons**2
    deviation = np.abs(losses - (losses[epsilons == 0][0] + slope * epsilons + quadratic))
    rounding = precision * float(np.abs(losses[np.isfinite(losses)]).max(initial=0.0))
    holds = deviation <= _DEVIATION * np.abs(quadratic) + rounding  # NaN does not
    broken = np.abs(epsilons[~holds]).min(initial=math.inf)
    return float(np.abs(epsilons[np.abs(epsilons) < broken]).max(initial=0.0))
