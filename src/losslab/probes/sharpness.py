"""How much can the loss rise nearby?"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.balls.neighbourhood import Neighbourhood, Norm
from losslab.probes.balls.rises import Search
from losslab.probes.base import ProbeResult, span, summary
from losslab.status import Progress

Method = Literal["ball", "average", "ascent", "adaptive"]


@dataclass(frozen=True)
class SharpnessResult(ProbeResult):
    """How much the loss rises within a radius, by one method, and what a quadratic loss would do.

    Attributes:
        value: The sharpness: the largest of `increases` (`average`: their mean; with `m`: the groups' mean).
        standard_error: Of a mean; NaN for a largest value, which bounds the true maximum from below.
        method: As asked for.
        norm: Of the neighbourhood, "l2" or "linf".
        radius: ρ.
        relative_radius: ρ over the size of θ in the same norm and unit.
        num_samples: Points, or ascents.
        m: Examples a group, None: all the data at once.
        loss: L(θ).
        increases: L(θ + δ) − L(θ) of each point, at the end of each ascent, or the largest of each group.
        flatness: 1/(1 + value), 1 where nothing rises.
        flat_fraction: The share of the sampled points that rise by `threshold` at most, which is the flat share of the
            neighbourhood's volume; NaN where no points were sampled.
        threshold: In units of the loss.
        first_order: max gᵀδ, what the slope alone would do.
        quadratic: What the curvature alone would do: ½ρ²·λ_max, or ½σ²·tr for `average`; with `m` the groups' mean.
            NaN where not asked for, and for ℓ∞, where it has no formula.
        quadratic_error: Of it: eigenvalue's error bound, or trace's standard error.
        gradients: Gradients over all the data that the ascents used.
        matvecs: Products over all the data.
    """

    value: float
    standard_error: float
    method: str
    norm: str
    radius: float
    relative_radius: float
    num_samples: int
    m: int | None
    loss: float
    increases: np.ndarray
    flatness: float
    flat_fraction: float
    threshold: float
    first_order: float
    quadratic: float
    quadratic_error: float
    gradients: int
    matvecs: int
    seed: int | None

    def __str__(self) -> str:
        mean = np.isfinite(self.standard_error)
        error = f" ± {self.standard_error:.1g}" if mean else ", a lower bound"
        rows = {
            "sharpness": f"{self.value:.4g}{error} ({self.method}, {self.norm})",
            "radius": f"{self.radius:.4g}, {self.relative_radius:.2%} of θ",
            "loss": f"{self.loss:.4g}; it rises by {span(self.increases)}",
            "quadratic model": f"{self.quadratic:.4g} ± {self.quadratic_error:.1g}, the slope {self.first_order:.4g}",
            "cost and status": f"{self.num_samples} points or ascents, {self.gradients} gradients, "
            f"{self.matvecs} products, {self.status}",
        }
        return summary(rows)


@dataclass(frozen=True)
class SharpnessOptions:
    """Details.

    Attributes:
        norm: "l2", or "linf": no entry changes by more than ρ (times |θ|).
        m: m-sharpness (Foret et al. 2021): the worst point of every m examples by themselves, then the mean over these
            groups weighted by their sizes. At most a batch; not for `average`, which it does not change.
        steps: Of each ascent at most.
        restarts: Ascents from random points, beside those from the centre and along the top eigenvector.
        threshold: Up to which rise a point counts as flat, in units of the loss.
        compare: Whether to compute the quadratic prediction.
    """

    norm: Norm = "l2"
    m: int | None = None
    steps: int = 20
    restarts: int = 2
    threshold: float = 0.1
    compare: bool = True

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("restarts", 0)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name}: expected a number >= {least}, got {getattr(self, name)!r}")
        if not self.threshold >= 0:
            raise ValueError(f"threshold: expected a number >= 0, got {self.threshold!r}")


def sharpness(
    risk: EmpiricalRisk,
    *,
    radius: float = 0.1,
    relative: bool = True,
    method: Method = "ball",
    num_samples: int = 50,
    options: SharpnessOptions | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SharpnessResult:
    """How sharp is the solution?  max over δ of L(θ + δ) − L(θ), δ = c∘η with ‖η‖ ≤ ρ.

    | method | what is reported | were the loss quadratic and flat at θ |
    | --- | --- | --- |
    | ball | the largest rise over `num_samples` points uniform in the ball | < ½ρ²λ_max |
    | average | the mean rise over δ ~ N(0, σ²I), σ² = ρ²/P: E‖δ‖² = ρ² | ½σ²·tr H |
    | ascent | the largest rise that projected gradient ascent finds, c = 1 | ½ρ²λ_max |
    | adaptive | the same with c = |θ| entry by entry (Kwon et al. 2021) | ½ρ²λ_max(DHD), D = diag(|θ|) |

    With `norm="linf"` the ball is the box of all η with no entry above ρ, and `average` is uniform in it, σ² = ρ²/3.
    All but `average` are lower bounds of a maximum. In P dimensions a random δ meets the top curvature with weight 1/P
    only: the rises of `ball` lie near ½ρ²·tr(H)/P for small ρ, far below the worst case. Compare solutions by it, at
    equal radius and number of points.

    ρ means nothing without its convention. By default it is in units of θ's own size, ‖θ/c‖ in the same norm, so that
    radius 0.1 reaches θ·1.1. The ascents of Foret et al. (2021) and Kwon et al. (2021) have absolute ones, around 0.05
    with c = 1 and 0.5 to 2 with c = |θ| (`relative=False`). Biases and norm layers belong to θ; `risk.restrict` leaves
    them out. Where θ is zero, `adaptive` leaves it zero.

    Args:
        risk: Where.
        radius: ρ.
        relative: Whether it is in units of θ's size.
        method: One of the above.
        num_samples: Points of `ball` and `average`.
        options: Norm, m-sharpness, ascents, flatness, comparison.
        seed: Of the random points.
        progress: Called after each point, step or product.

    Returns:
        SharpnessResult. Cost: num_samples + 1 forward passes; ascents up to (steps + 1)·(restarts + 3) gradients.
        The comparison: one gradient, and 5 to 15 products, or up to 48 for `average`.

    Raises:
        ValueError: An argument out of range.
        UserWarning: A module without second derivatives: the comparison takes finite differences.
    """
    require_risk(risk)
    options = options or SharpnessOptions()
    _check(method, num_samples, options)
    around = Neighbourhood.around(risk, radius, relative=relative, norm=options.norm, adaptive=method == "adaptive")
    m = options.m
    search = Search(around, method, num_samples, options.steps, options.restarts, options.compare, seed)
    found = search.everywhere(risk, progress) if m is None else search.group_by_group(risk, m, progress)
    sampled = m is None and method in ("ball", "average")
    flat = float(np.mean(found.increases <= options.threshold)) if sampled and found.num_samples else math.nan
    return SharpnessResult(
        status=found.status,
        value=found.value,
        standard_error=found.standard_error,
        method=method,
        norm=options.norm,
        radius=around.radius,
        relative_radius=around.radius / around.size if around.size else math.inf,
        num_samples=found.num_samples,
        m=m,
        loss=found.loss,
        increases=found.increases,
        flatness=1 / (1 + max(0.0, found.value)) if not math.isnan(found.value) else math.nan,
        flat_fraction=flat,
        threshold=options.threshold,
        first_order=found.prediction.first_order,
        quadratic=found.prediction.quadratic,
        quadratic_error=found.prediction.error,
        gradients=found.gradients,
        matvecs=found.prediction.matvecs,
        seed=seed,
    )


def _check(method: str, num_samples: int, options: SharpnessOptions) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {', '.join(get_args(Method))}; got {method!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples!r}")
    if options.m is not None and method == "average":
        raise ValueError("m: expected None with method='average', whose mean over the groups is that over all the data")
