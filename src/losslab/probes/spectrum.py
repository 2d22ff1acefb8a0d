"""The Hessian's spectrum from one shared Krylov run: both ends, density, trace, and what follows from them."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from losslab.memory import free_bytes
from losslab.operators.base import LinearOperator
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.base import ProbeResult
from losslab.random import make_generator, rademacher
from losslab.solvers.budget import Budget
from losslab.solvers.density import density_from, extend, quadrature
from losslab.solvers.estimate import Density, Estimate
from losslab.solvers.krylov import Krylov
from losslab.solvers.lanczos import Search, run
from losslab.solvers.trace import complete
from losslab.status import Progress, Status, worst


@dataclass(frozen=True)
class SpectrumResult(ProbeResult):
    """The curvature at a point.

    Attributes:
        top: (k,) the largest eigenvalues, descending, with error bounds `top_errors`.
        smallest: (k,) the smallest (algebraically), ascending, with error bounds `smallest_errors`.
        trace: tr H with its standard error.
        density: Of all P eigenvalues, with its standard error over probes.
        condition_number: |λ_max/λ_min|, of the largest and the smallest eigenvalue, with `condition_number_error`.
        spectral_gap: λ₁ − λ₂.
        num_negative: How many eigenvalues are certainly negative: the negative Ritz values, beyond rounding. A lower
            bound, since Ritz values interlace the eigenvalues (Cauchy).
        negative_mass: The fraction of all eigenvalues that is negative, by the density (below −10⁻⁴ of the largest).
        num_parameters: P.
        num_examples: N.
        matvecs: Products in all.
    """

    top: np.ndarray
    top_errors: np.ndarray
    smallest: np.ndarray
    smallest_errors: np.ndarray
    trace: Estimate
    density: Density
    condition_number: float
    condition_number_error: float
    spectral_gap: float
    num_negative: int
    negative_mass: float
    num_parameters: int
    num_examples: int
    matvecs: int
    seed: int | None

    def __str__(self) -> str:
        top = ", ".join(f"{v:.3g} ± {e:.0e}" for v, e in zip(self.top, self.top_errors, strict=True))
        low = ", ".join(f"{v:.3g} ± {e:.0e}" for v, e in zip(self.smallest, self.smallest_errors, strict=True))
        return (
            f"largest eigenvalues   {top}\n"
            f"smallest eigenvalues  {low}\n"
            f"trace                 {self.trace.value:.3g} ± {self.trace.standard_error:.1g}\n"
            f"condition number      {self.condition_number:.3g} ± {self.condition_number_error:.1g}\n"
            f"negative eigenvalues  at least {self.num_negative} of {self.num_parameters}\n"
            f"cost and status       {self.matvecs} products, {self.status}"
        )


@dataclass(frozen=True)
class SpectrumOptions:
    """How much to spend.

    Attributes:
        tol: Relative residual of the eigenvalues to stop at.
        floor: Or residual as a share of the largest |eigenvalue|: the smallest eigenvalues of a trained network lie so
            near zero that most of the cost would go into digits of them that nobody needs. Their errors are stated; 0
            asks for `tol` of them too.
        max_basis: Krylov vectors kept: memory max_basis × P numbers.
        max_matvecs: Products for the eigenvalues at most; density and trace have their own.
        num_nodes: Lanczos steps for the density, and at least for the shared run.
        num_probes: Start vectors of the density; the shared run is the first.
        trace_tol: Relative standard error of the trace to stop at.
        trace_samples: Products for the trace at most.
        time_budget: Seconds for all of it at most; None: no limit.
    """

    tol: float = 1e-3
    floor: float = 1e-4
    max_basis: int = 100
    max_matvecs: int = 300
    num_nodes: int = 40
    num_probes: int = 3
    trace_tol: float = 0.01
    trace_samples: int = 32
    time_budget: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (value > 0 or (name == "floor" and value == 0)):
                raise ValueError(f"{name}: expected a number > 0, got {value!r}")


def spectrum(
    risk: EmpiricalRisk,
    k: int = 5,
    *,
    options: SpectrumOptions | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SpectrumResult:
    """How is the loss curved at this point?  The k largest and k smallest eigenvalues of the Hessian, density, trace.

    One Lanczos run from a Rademacher vector gives the eigenvalues at both ends with their error bounds, the first
    sample of the density, and the basis that the trace is deflated by; `num_probes − 1` further runs complete the
    density's error band, and `trace_samples` single products the trace.

    Args:
        risk: Where.
        k: Eigenvalues at each end.
        options: Tolerances and budgets.
        seed: Of all random vectors.
        progress: Called after each product.

    Returns:
        SpectrumResult; `status` is that of its weakest part. Cost: `matvecs` products, 150 to 200 by default.

    Raises:
        ValueError: k out of range.
        RuntimeError: The model has no second derivatives; the message names the module.
    """
    return spectrum_of(Hessian(risk), k, risk.num_examples, options or SpectrumOptions(), seed, progress)


def spectrum_of(
    operator: LinearOperator, k: int, num_examples: int, options: SpectrumOptions, seed: int, progress: Progress | None
) -> SpectrumResult:
    """`spectrum` for any symmetric operator."""
    if not isinstance(k, int) or k < 1 or 2 * k > operator.size:
        raise ValueError(f"k: expected 1 <= k <= {operator.size // 2} for {operator.size} parameters, got {k!r}")
    generator = make_generator(seed)
    ranks, expected = operator.split.ranks, _expected(options)
    budget = Budget(options.num_nodes, options.time_budget, progress, expected=expected, ranks=ranks)
    starts = rademacher((options.num_probes, operator.size), generator)
    krylov = Krylov(operator, starts[0], _basis_size(operator, k, options))
    search = Search(krylov, k, "both_ends", options.tol, options.floor)
    statuses = [extend(krylov, options.num_nodes, budget)]
    quadratures, density_matvecs = [quadrature(krylov)], krylov.matvecs
    eigenvalues = statuses[0]
    if eigenvalues.ok and not search.found():
        budget.allow(options.max_matvecs - krylov.matvecs)
        eigenvalues = run(search, search.found, budget, generator)
    for start in starts[1:]:
        other = Krylov(operator, start, options.num_nodes)
        budget.allow(options.num_nodes)
        statuses.append(extend(other, options.num_nodes, budget))
        quadratures.append(quadrature(other))
        density_matvecs += other.matvecs
    density = density_from(quadratures, density_matvecs, worst(*statuses), seed=seed)
    budget.allow(options.trace_samples)
    trace = complete(krylov, options.trace_tol, generator, budget, seed)
    status = worst(trace.status, eigenvalues, density.status)
    return _summary(search, trace, density, status, num_examples, budget.used, seed)


def _expected(options: SpectrumOptions) -> int:
    """Products that the whole will take, about: the total of its progress."""
    return options.max_basis + (options.num_probes - 1) * options.num_nodes + options.trace_samples


def _basis_size(operator: LinearOperator, k: int, options: SpectrumOptions) -> int:
    """`max_basis`, or what half of the free memory holds (kept graphs may have taken a quarter of it)."""
    row = operator.size * torch.promote_types(operator.dtype, torch.float32).itemsize
    affordable = free_bytes(operator.device) // 2 // row
    return max(min(options.max_basis, affordable), options.num_nodes, 2 * k + 4)


def _summary(
    search: Search, trace: Estimate, density: Density, status: Status, num_examples: int, matvecs: int, seed: int
) -> SpectrumResult:
    pairs = search.result(status, vectors=False, seed=seed)
    k = search.k
    top, smallest = pairs.values[:k], pairs.values[k:]
    every = search.krylov.ritz()[0]
    largest = np.abs(every).max(initial=0.0)
    condition = float(abs(top[0] / smallest[0])) if smallest[0] else math.inf
    return SpectrumResult(
        status=status,
        top=top,
        top_errors=pairs.errors[:k],
        smallest=smallest,
        smallest_errors=pairs.errors[k:],
        trace=trace,
        density=density,
        condition_number=condition,
        # First order: the relative errors add.
        condition_number_error=condition * float(pairs.errors[0] / abs(top[0]) + pairs.errors[k] / abs(smallest[0]))
        if 0 < condition < math.inf
        else math.inf,
        spectral_gap=float(top[0] - top[1]) if k > 1 else float("nan"),
        num_negative=int((every < -search.krylov.rounding * largest).sum()),
        negative_mass=density.mass(-np.inf, np.nextafter(-1e-4 * largest, -np.inf)),  # below it, also where it is 0
        num_parameters=search.krylov.operator.size,
        num_examples=num_examples,
        matvecs=matvecs,
        seed=seed,
    )
