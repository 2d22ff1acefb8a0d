"""The density of log₁₀|λ|: how eigenvalues spread over the decades, where a linear axis shows one spike at zero."""

import math
from dataclasses import dataclass

import numpy as np

from losslab.solvers.density import smooth
from losslab.solvers.estimate import Density
from losslab.status import Status

_MAX_POINTS = 20_000  # of the grid


@dataclass(frozen=True)
class LogDensity:
    """The density of log₁₀|λ|, positive and negative eigenvalues apart, in fractions of all eigenvalues a decade.

    ∫positive + ∫negative + below_floor = 1.

    Attributes:
        grid: (G,) log₁₀|λ|.
        positive: (G,) of the eigenvalues above the floor ε.
        positive_error: (G,) its standard error, over the choice of random signs.
        negative: (G,) of the eigenvalues below −ε, by their magnitude.
        negative_error: (G,) its standard error.
        below_floor: The fraction with |λ| ≤ ε.
        below_floor_error: Its standard error.
        floor: ε.
        resolution: The |λ| below which a probe has less than two nodes (those at zero left out): what lies below it is
            counted right as a whole, but stands where the quadrature put it, `below_floor` too. More nodes lower it.
        width: Standard deviation of the kernel, in decades.
        matvecs: Products used, those of the density.
        status: Why its solver stopped.
    """

    grid: np.ndarray
    positive: np.ndarray
    positive_error: np.ndarray
    negative: np.ndarray
    negative_error: np.ndarray
    below_floor: float
    below_floor_error: float
    floor: float
    resolution: float
    width: float
    matvecs: int
    status: Status
    seed: int | None = None

    def __str__(self) -> str:
        below = f"{self.below_floor:.3g} ± {self.below_floor_error:.1g} of all within ±{self.floor:.2g}"
        return f"{len(self.grid)} points, {below} ({self.matvecs} products, {self.status})"


def log_density(density: Density, size: int, *, floor: float | None = None, width: float = 0.1) -> LogDensity:
    """How are the eigenvalues' magnitudes spread over the decades? (The log-spectrum of Papyan 2019.)

    The quadrature of `spectral_density` serves any function of λ, so also the Gaussians N(x; log₁₀|λ|, width²): no
    further product, and no inverse iteration for the small end. The band is that of random signs, as in
    `spectral_density`: the variance of zᵀf(A)z/n is at most (2/n)·(1/n)Σf(λᵢ)².

    Args:
        density: From `spectral_density`, or a spectrum's. With `vectors` of one's own the band does not hold.
        size: n, how many eigenvalues there are.
        floor: ε, below which a magnitude counts as zero; default 10⁻⁶ of the largest, the rounding of float32.
        width: Standard deviation of the kernel, in decades.

    Returns:
        LogDensity. Cost: no product.

    Raises:
        ValueError: size below 1, or a floor or width that is not above zero, or a width that no grid can show.

    >>> import torch
    >>> from losslab.operators.dense import DenseOperator
    >>> from losslab.solvers.density import spectral_density
    >>> values = torch.tensor([100.0, 1.0, -1.0, 0.0])
    >>> result = log_density(spectral_density(DenseOperator(torch.diag(values))), 4)
    >>> [round(float(np.trapezoid(curve, result.grid)), 3) for curve in (result.positive, result.negative)]
    [0.5, 0.25]
    """
    magnitudes = np.abs(density.nodes)
    largest = float(magnitudes.max(initial=0.0)) or 1.0
    floor = 1e-6 * largest if floor is None else floor
    if size < 1 or not floor > 0 or not width > 0:
        raise ValueError(f"size, floor, width: expected numbers > 0, got {size!r}, {floor!r}, {width!r}")
    low, high = math.log10(floor), math.log10(max(largest, floor))
    # As in `density_from`: the integral over the grid is exact to 1e-9.
    num_points = int(4 * (high - low + 12 * width) / width) + 2
    if num_points > _MAX_POINTS:
        raise ValueError(f"width: expected at least {4 * (high - low) / (_MAX_POINTS - 50):.3g} decades, got {width!r}")
    grid = np.linspace(low - 6 * width, high + 6 * width, num_points)
    samples = size * density.num_probes

    def curve(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(chosen) and not chosen.any():
            return np.zeros(num_points), np.zeros(num_points)
        places, weights = np.log10(magnitudes[chosen]), density.weights[chosen]
        # The square of a Gaussian is one of width/√2, divided by 2√π·width.
        squares = smooth(places, weights, grid, width / math.sqrt(2)) / (2 * math.sqrt(math.pi) * width)
        return smooth(places, weights, grid, width), np.sqrt(2 * squares / samples)

    positive, positive_error = curve(density.nodes > floor)
    negative, negative_error = curve(density.nodes < -floor)
    below = float(density.weights[magnitudes <= floor].sum()) if len(magnitudes) else math.nan
    closest = np.sort(magnitudes[magnitudes > floor])[: 2 * density.num_probes]
    return LogDensity(
        grid=grid,
        positive=positive,
        positive_error=positive_error,
        negative=negative,
        negative_error=negative_error,
        below_floor=below,
        below_floor_error=math.sqrt(2 * below / samples),
        floor=floor,
        resolution=float(closest[-1]) if len(closest) else math.nan,
        width=width,
        matvecs=density.matvecs,
        status=density.status,
        seed=density.seed,
    )
