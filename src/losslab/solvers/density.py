"""The spectral density by stochastic Lanczos quadrature (Ubaru, Chen & Saad 2017; Ghorbani et al. 2019)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from losslab.operators.base import LinearOperator, require_operator
from losslab.random import make_generator, rademacher
from losslab.solvers.budget import Budget
from losslab.solvers.estimate import Density
from losslab.solvers.krylov import Krylov
from losslab.status import Progress, Status, worst

_MAX_POINTS = 20_000  # of the grid

Quadrature = tuple[np.ndarray, np.ndarray]


def spectral_density(
    operator: LinearOperator,
    *,
    num_probes: int = 4,
    num_nodes: int = 40,
    width: float | None = None,
    seed: int | torch.Generator = 0,
    vectors: Tensor | None = None,
    time_budget: float | None = None,
    progress: Progress | None = None,
) -> Density:
    """How are all the eigenvalues spread?  ρ(λ) = (1/n) Σᵢ δ(λ − λᵢ), smoothed.

    From a Rademacher vector z, m Lanczos steps give the Gauss quadrature of the measure (1/n) Σᵢ (uᵢᵀz)² δ(λ − λᵢ),
    whose mean over z is ρ. For signs z the variance of zᵀf(A)z/n is at most (2/n)·(1/n)Σf(λᵢ)² (Hutchinson 1990), and
    the same quadrature gives that sum: one vector has its error band, narrow where many eigenvalues are and as wide as
    the density itself at a single outlier. What m nodes cannot resolve is not in it.

    Args:
        operator: Symmetric n×n.
        num_probes: Random start vectors; the band falls as 1/√num_probes.
        num_nodes: Lanczos steps for each.
        width: Standard deviation of the Gaussian that smooths, in units of λ; default 1 % of the spectrum's range.
        seed: Of the vectors; or a generator.
        vectors: (num_probes, n) start vectors of one's own; the band is then their scatter, NaN for a single one.
        time_budget: Seconds at most; the density is then that of the probes and nodes there are.
        progress: Called after each product.

    Returns:
        Density. Cost: num_probes × num_nodes products; memory num_nodes × n.

    Raises:
        ValueError: num_probes or num_nodes below 1, vectors of another shape, width not above 0 or too small.
    """
    require_operator(operator)
    if num_probes < 1 or num_nodes < 1:
        raise ValueError(f"num_probes, num_nodes: expected at least 1 of each, got {num_probes} and {num_nodes}")
    signs = vectors is None
    known_seed = seed if isinstance(seed, int) and signs else None
    if vectors is None:
        vectors = rademacher((num_probes, operator.size), make_generator(seed))
    elif vectors.ndim != 2 or vectors.shape[1] != operator.size or not len(vectors):
        raise ValueError(f"vectors: expected shape (num_probes, {operator.size}), got {tuple(vectors.shape)}")
    budget = Budget(len(vectors) * num_nodes, time_budget, progress, ranks=operator.split.ranks)
    quadratures, statuses = [], []
    for vector in vectors:
        krylov = Krylov(operator, vector, num_nodes)
        statuses.append(extend(krylov, num_nodes, budget))
        quadratures.append(quadrature(krylov))
        if not statuses[-1].ok:
            break
    scatter = operator.size if signs else None
    return density_from(quadratures, budget.used, worst(*statuses), width, known_seed, signs_in=scatter)


def extend(krylov: Krylov, num_steps: int, budget: Budget, note: Callable[[], str] = lambda: "density") -> Status:
    """Lanczos steps until the space has `num_steps` vectors or is invariant."""
    while krylov.size < min(num_steps, krylov.operator.size) and not krylov.broken:
        if (over := budget.stop()) is not None:
            return over
        krylov.step()
        budget.spend(1, note)
        if not krylov.finite:
            return Status.nonfinite
    return Status.converged


def quadrature(krylov: Krylov) -> Quadrature:
    """Nodes and weights (which sum to 1) of the start vector's spectral measure; before any restart."""
    values, _, vectors = krylov.ritz()
    return values, vectors[0] ** 2 if len(values) else values


def density_from(
    quadratures: list[Quadrature],
    matvecs: int,
    status: Status,
    width: float | None = None,
    seed: int | None = None,
    *,
    signs_in: int | None = None,
) -> Density:
    """Mean over probes of the smoothed measures, on a grid that covers all nodes, with its standard error.

    The error is the bound for random signs in `signs_in` dimensions, or the scatter between probes.
    """
    nodes = np.concatenate([n for n, _ in quadratures])
    low, high = (nodes.min(), nodes.max()) if len(nodes) else (0.0, 0.0)
    largest = max(abs(low), abs(high))
    if width is None:  # a range that is rounding (a multiple of the identity) gives no scale
        width = 0.01 * (high - low if high - low > 1e-5 * largest else largest or 1e-12)
    if not width > 0:
        raise ValueError(f"width: expected a number > 0, got {width!r}")
    # Six standard deviations beyond the ends leave out 1e-9 of the outermost Gaussian; four points a standard deviation
    # make the trapezoid rule exact to 1e-30, so that the integral over the grid is 1.
    num_points = int(4 * (high - low + 12 * width) / width + 1e-6) + 2  # rounding must not decide at whole numbers
    if num_points > _MAX_POINTS:
        least = 4 * (high - low) / (_MAX_POINTS - 50)
        raise ValueError(f"width: expected at least {least:.3g} for this spectrum, got {width!r}")
    grid = np.linspace(low - 6 * width, high + 6 * width, num_points)
    curves = np.stack([smooth(*pair, grid, width) for pair in quadratures])
    num = len(quadratures)
    weights = np.concatenate([w for _, w in quadratures]) / num
    if signs_in is not None:  # the square of a Gaussian is one of width/√2, divided by 2√π·width
        squares = smooth(nodes, weights, grid, width / np.sqrt(2)) / (2 * np.sqrt(np.pi) * width)
        error = np.sqrt(2 * squares / (signs_in * num))
    else:
        error = curves.std(axis=0, ddof=1) / np.sqrt(num) if num > 1 else np.full(len(grid), np.nan)
    return Density(grid, curves.mean(axis=0), error, nodes, weights, float(width), num, matvecs, status, seed)


def smooth(nodes: np.ndarray, weights: np.ndarray, grid: np.ndarray, width: float) -> np.ndarray:
    """Σ w·N(λ; node, width²) on the grid; NaN where there is no node (the first product was not finite)."""
    if not len(nodes):
        return np.full(len(grid), np.nan)
    gaussians = np.exp(-0.5 * ((grid[:, None] - nodes[None, :]) / width) ** 2)
    return gaussians @ weights / (width * np.sqrt(2 * np.pi))
