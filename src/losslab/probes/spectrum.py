"""The Hessian's spectrum from one shared Krylov run: both ends, density, trace, and what follows from them."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losslab.memory import free_bytes
from losslab.operators.base import LinearOperator
from losslab.operators.finite_difference import hessian_of
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.operators.risk_operator import RiskOperator
from losslab.probes.base import ProbeResult, summary
from losslab.probes.sampling import SamplingError, between_batches
from losslab.random import make_generator, rademacher
from losslab.solvers.budget import Budget
from losslab.solvers.deflated import complete
from losslab.solvers.density import density_from, extend, quadrature
from losslab.solvers.estimate import Density, Eigenpairs, Estimate
from losslab.solvers.krylov import Krylov
from losslab.solvers.lanczos import Search, run
from losslab.status import Progress, worst


@dataclass(frozen=True)
class SpectrumResult(ProbeResult):
    """The curvature at a point.

    Attributes:
        top: (k,) the largest eigenvalues, descending, with error bounds `top_errors`.
        smallest: (k,) the smallest (algebraically), ascending, with error bounds `smallest_errors`.
        trace: tr H with its standard error.
        density: Of all P eigenvalues, with its standard error over probes.
        condition_number: |λ_max/λ_min|, of the largest and the smallest eigenvalue, with `condition_number_error`.
        positive_condition_number: λ_max/λ_{min>0}, at least: by the smallest Ritz value whose error interval lies above
            zero, since an eigenvalue is in that interval. It grows with the effort; NaN where there is none.
        spectral_gap: λ₁ − λ₂.
        num_negative: How many eigenvalues are certainly negative: the negative Ritz values, beyond rounding. A lower
            bound, since Ritz values interlace the eigenvalues (Cauchy).
        num_negative_resolved: How many of them are known one by one: Ritz values whose error interval lies below zero.
        negative_mass: The fraction of all eigenvalues that is negative, by the density (below −10⁻⁴ of the largest),
            with its standard error `negative_mass_error`: the estimate of what `num_negative` bounds is P times that.
        frobenius_norm: ‖H‖_F with its standard error.
        effective_rank: (tr H)²/‖H‖_F²: how many equal eigenvalues would have this trace and norm.
        num_parameters: P.
        num_examples: N.
        matvecs: Products in all.
        sampling: What the choice of examples leaves uncertain, where the risk took a part of them (`max_examples`).
        product: How products were computed.
    """

    top: np.ndarray
    top_errors: np.ndarray
    smallest: np.ndarray
    smallest_errors: np.ndarray
    trace: Estimate
    density: Density
    condition_number: float
    condition_number_error: float
    positive_condition_number: float
    spectral_gap: float
    num_negative: int
    num_negative_resolved: int
    negative_mass: float
    negative_mass_error: float
    frobenius_norm: Estimate
    effective_rank: float
    num_parameters: int
    num_examples: int
    matvecs: int
    seed: int | None
    sampling: SamplingError | None = None
    product: str = "exact"

    def __str__(self) -> str:
        top = ", ".join(f"{v:.3g} ± {e:.0e}" for v, e in zip(self.top, self.top_errors, strict=True))
        low = ", ".join(f"{v:.3g} ± {e:.0e}" for v, e in zip(self.smallest, self.smallest_errors, strict=True))
        rows = {
            "largest eigenvalues": top,
            "smallest eigenvalues": low,
            "trace": f"{self.trace.value:.3g} ± {self.trace.standard_error:.1g}",
            "condition number": f"{self.condition_number:.3g} ± {self.condition_number_error:.1g}",
            "effective rank": f"{self.effective_rank:.3g}",
            "negative eigenvalues": f"at least {self.num_negative} of {self.num_parameters}",
            "cost and status": f"{self.matvecs} products, {self.status}",
        }
        return summary(rows)


@dataclass(frozen=True)
class SpectrumOptions:
    """How much to spend.

    Attributes:
        tol: Relative residual of the eigenvalues to stop at.
        floor: Or residual as a share of the largest |eigenvalue|: the smallest eigenvalues of a trained network lie so
            near zero that most of the cost would go into digits of them that nobody needs. Their errors are stated; 0
            asks for `tol` of them too.
        max_basis: Krylov vectors kept: memory max_basis × P numbers.
        max_matvecs: Products for the eigenvalues at most; further density probes and the trace have their own.
        num_nodes: Lanczos steps for the density, and at least for the shared run.
        num_probes: Start vectors of the density; the shared run is the first, and has an error band by itself.
        trace_tol: Relative standard error of the trace to stop at.
        trace_samples: Products for the trace at most.
        time_budget: Seconds for all of it at most; None: no limit.
    """

    tol: float = 1e-3
    floor: float = 1e-4
    max_basis: int = 100
    max_matvecs: int = 300
    num_nodes: int = 100
    num_probes: int = 1
    trace_tol: float = 0.01
    trace_samples: int = 48
    time_budget: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (value > 0 or (name == "floor" and value == 0)):
                raise ValueError(f"{name}: expected a number > 0, got {value!r}")

    @classmethod
    def many(cls, k: int) -> "SpectrumOptions":
        """For tens of eigenvalues at each end: a larger Krylov space, more products, a trace to 2 %."""
        sizes = {"max_basis": max(cls.max_basis, 10 * k), "max_matvecs": max(cls.max_matvecs, 30 * k)}
        return cls(**sizes, trace_tol=0.02, trace_samples=100)

    @property
    def expected_matvecs(self) -> int:
        """Products that all of it takes where the eigenvalues converge within the density's nodes."""
        return self.num_probes * self.num_nodes + self.trace_samples


def spectrum(
    risk: EmpiricalRisk,
    k: int = 5,
    *,
    options: SpectrumOptions | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SpectrumResult:
    """How is the loss curved at this point?  The k largest and k smallest eigenvalues of the Hessian, density, trace.

    One Lanczos run from a Rademacher vector gives the eigenvalues at both ends with their error bounds, the density
    with its error band, and the basis that the trace and the norm are deflated by; `trace_samples` single products at
    most complete the trace.

    Args:
        risk: Where.
        k: Eigenvalues at each end.
        options: Tolerances and budgets.
        seed: Of all random vectors.
        progress: Called after each product, with the present Ritz values and residuals.

    Returns:
        SpectrumResult; `status` is that of its weakest part. Cost: `matvecs` products, 110 to 150 by default.

    Raises:
        ValueError: k out of range.
        UserWarning: A module without second derivatives; then products are finite differences of gradients.
    """
    require_risk(risk)
    options = options or SpectrumOptions()
    hessian = hessian_of(risk)
    result, top_vector = spectrum_of(hessian, k, risk.num_examples, options, seed, progress)
    if not isinstance(hessian, RiskOperator):
        return dataclasses.replace(result, product="finite differences")
    if risk.num_examples == risk.population or not np.isfinite(result.top[0]):
        return result
    sampling = between_batches(hessian, top_vector, seed)
    return dataclasses.replace(result, sampling=sampling, matvecs=result.matvecs + sampling.matvecs)


def spectrum_of(
    operator: LinearOperator, k: int, num_examples: int, options: SpectrumOptions, seed: int, progress: Progress | None
) -> tuple[SpectrumResult, Tensor]:
    """`spectrum` for any symmetric operator; also the top eigenvector, (P,)."""
    generator = make_generator(seed)
    ranks, expected = operator.split.ranks, options.expected_matvecs
    budget = Budget(options.num_nodes, options.time_budget, progress, expected=expected, ranks=ranks)
    starts = rademacher((options.num_probes, operator.size), generator)
    krylov = Krylov(operator, starts[0], basis_rows(operator, k, options))
    search = Search(krylov, k, "both_ends", options.tol, options.floor)
    statuses = [extend(krylov, options.num_nodes, budget, search.note)]
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
    density = density_from(quadratures, density_matvecs, worst(*statuses), seed=seed, signs_in=operator.size)
    budget.allow(options.trace_samples)
    trace, norm = complete(krylov, options.trace_tol, generator, budget, seed)
    status = worst(trace.status, eigenvalues, density.status)
    pairs = search.result(status, vectors=True, seed=seed)
    assert pairs.vectors is not None
    return _summary(search, pairs, trace, norm, density, num_examples, budget.used), pairs.vectors[:, 0]


def basis_rows(operator: LinearOperator, k: int, options: SpectrumOptions) -> int:
    """Krylov vectors to keep: `max_basis`, or what half of the free memory holds (kept graphs may take a quarter).

    Raises:
        ValueError: k is not between 1 and half the operator's size.
    """
    if operator.size < 2:
        raise ValueError("params: expected at least 2 parameters for both ends of a spectrum, got 1; use eigenpairs")
    if not isinstance(k, int) or k < 1 or 2 * k > operator.size:
        raise ValueError(f"k: expected 1 <= k <= {operator.size // 2} for {operator.size} parameters, got {k!r}")
    row = operator.split.local_size * torch.promote_types(operator.dtype, torch.float32).itemsize
    affordable = int(min(operator.split.ranks.each(free_bytes(operator.device) // 2 // row)))  # all decide alike
    return min(max(min(options.max_basis, affordable), options.num_nodes, 2 * k + 4), operator.size)


def _summary(
    search: Search,
    pairs: Eigenpairs,
    trace: Estimate,
    norm: Estimate,
    density: Density,
    num_examples: int,
    matvecs: int,
) -> SpectrumResult:
    k, rounding, size = search.k, search.krylov.rounding, search.krylov.operator.size
    top, smallest = pairs.values[:k], pairs.values[k:]
    every, residuals, _ = search.krylov.ritz()
    largest = np.abs(every).max(initial=0.0)
    errors = residuals + rounding * largest
    positive = every[every - errors > 0] + errors[every - errors > 0]
    condition = float(abs(top[0] / smallest[0])) if smallest[0] else math.inf
    negative_mass = density.mass(-np.inf, np.nextafter(-1e-4 * largest, -np.inf))  # below it, also where it is 0
    return SpectrumResult(
        status=pairs.status,
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
        positive_condition_number=float(top[0] / positive.min()) if len(positive) else math.nan,
        spectral_gap=float(top[0] - top[1]) if k > 1 else float("nan"),
        num_negative=int((every < -rounding * largest).sum()),
        num_negative_resolved=int((every + errors < 0).sum()),
        negative_mass=negative_mass,
        # A projector's trace from signs: variance at most 2·(its rank) of n² (Hutchinson 1990).
        negative_mass_error=math.sqrt(2 * negative_mass / (size * density.num_probes)),
        frobenius_norm=norm,
        effective_rank=trace.value**2 / norm.value**2 if norm.value else math.nan,
        num_parameters=size,
        num_examples=num_examples,
        matvecs=matvecs,
        seed=pairs.seed,
    )
