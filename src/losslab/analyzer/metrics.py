"""What the analyzer measures at a point, and what it means in words."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from losslab.probes.base import ProbeResult
from losslab.probes.sharpness import SharpnessResult
from losslab.probes.spectrum import SpectrumResult
from losslab.status import Status, worst


@dataclass(frozen=True)
class Scale:
    """A rule of thumb: words for what lies below each limit, the last for all above; and why not to trust it alone."""

    title: str
    limits: tuple[float, ...]
    words: tuple[str, ...]
    caveat: str

    def word(self, value: float) -> str:
        """The words for a value; a limit itself belongs to the class above it."""
        if np.isnan(value):
            return "not known"
        return self.words[sum(value >= limit for limit in self.limits)]


CONDITION = Scale(
    "condition number",
    (100, 1000),
    (
        "excellent: fast convergence expected",
        "good: standard optimization works well",
        "challenging: may need learning rate tuning or preconditioning",
    ),
    "it bounds the speed of gradient descent where all eigenvalues are positive; |λ_max/λ_min| of an indefinite "
    "Hessian bounds nothing, and a network's near-zero eigenvalues make λ_max/λ_{min>0} as large as one looks closely",
)
SHARPNESS = Scale(
    "sharpness",
    (0.1, 1.0),
    (
        "flat minimum: good generalization hoped for",
        "moderate",
        "sharp minimum: risk of overfitting",
    ),
    "it depends on the radius and on the weights' scale, and a network can be rescaled to any sharpness without "
    "changing its function (Dinh et al. 2017): compare networks of one architecture at one radius only",
)
NEGATIVE = Scale(
    "negative eigenvalues",
    (6,),
    ("near a local minimum", "likely at a saddle point, which optimization can leave"),
    "the count is a lower bound that grows with the effort; trained networks keep many eigenvalues just below zero, so "
    "their size beside λ_max says more than their number",
)
BARRIER = Scale(
    "barrier",
    (0.1, 1.0),
    (
        "highly connected: the same basin",
        "moderately connected: related solutions",
        "disconnected on the straight line",
    ),
    "a barrier on the straight line does not separate two solutions: a curve or a permutation of units often removes "
    "it (losslab.curve, losslab.align)",
)


@dataclass(frozen=True)
class LandscapeMetrics:
    """The geometry of the loss at a point.

    Attributes:
        condition_number: |λ_max/λ_min| of the largest and the smallest eigenvalue, with `condition_number_error`.
        positive_condition_number: λ_max/λ_{min>0}, a lower bound.
        sharpness: The largest rise of the loss over `sharpness_samples` points of the ball of `sharpness_radius`.
        flatness: 1/(1 + sharpness).
        spectral_gap: λ₁ − λ₂.
        num_negative_eigenvalues: Negative Ritz values beyond rounding: a lower bound.
        trace: tr H, with the standard error `trace_error`.
        top_eigenvalues: The largest eigenvalues, descending, with bounds `top_errors`.
        smallest_eigenvalues: The smallest ones, ascending, with bounds `smallest_errors`.
        effective_rank: (tr H)²/‖H‖_F².
        train_loss: L on the training data.
        test_loss: L on the test data, NaN without any; `generalization_gap` is their difference.
        train_accuracy: Share of right answers, NaN where these are not classes.
        test_accuracy: The same on the test data.
        num_parameters: P.
        num_examples: N.
        matvecs: Hessian-vector products in all.
        status: That of the weakest part.
    """

    condition_number: float
    condition_number_error: float
    positive_condition_number: float
    sharpness: float
    sharpness_radius: float
    sharpness_samples: int
    flatness: float
    spectral_gap: float
    num_negative_eigenvalues: int
    trace: float
    trace_error: float
    top_eigenvalues: np.ndarray
    top_errors: np.ndarray
    smallest_eigenvalues: np.ndarray
    smallest_errors: np.ndarray
    effective_rank: float
    train_loss: float
    test_loss: float
    generalization_gap: float
    train_accuracy: float
    test_accuracy: float
    num_parameters: int
    num_examples: int
    matvecs: int
    status: Status

    def interpret(self, connectivity: Mapping[str, Any] | None = None) -> str:
        """The numbers in words, each with what it does not say.

        The scales are conventions of common use, not theorems. `connectivity` is what
        `LossLandscapeAnalyzer.compute_mode_connectivity` returned, and adds the barrier.
        """
        values = {CONDITION: self.condition_number, SHARPNESS: self.sharpness}
        values[NEGATIVE] = float(self.num_negative_eigenvalues)
        if connectivity is not None:
            values[BARRIER] = float(connectivity["barrier_height"])
        return _told(values, self.status)

    def __str__(self) -> str:
        return self.interpret()


def in_words(results: Iterable[ProbeResult]) -> str:
    """What `LandscapeMetrics.interpret` says, of probes' results; of those that it has no scale for, nothing."""
    values: dict[Scale, float] = {}
    statuses = [Status.complete]
    for result in results:
        if isinstance(result, SpectrumResult):
            values |= {CONDITION: result.condition_number, NEGATIVE: float(result.num_negative)}
            statuses.append(result.status)
        elif isinstance(result, SharpnessResult):
            values[SHARPNESS] = result.value
            statuses.append(result.status)
    return _told(values, worst(*statuses))


def _told(values: Mapping[Scale, float], status: Status) -> str:
    lines = []
    for scale, value in values.items():
        lines += [f"{scale.title} {value:.3g}: {scale.word(value)}", f"    ({scale.caveat})"]
    if not status.ok:
        lines.append(f"Not all of it is certain: {status.message}.")
    return "\n".join(lines)
