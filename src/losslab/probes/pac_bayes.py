"""PAC-Bayes: how large can the error on new data be, for weights drawn from a Gaussian around the solution?"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import rel_entr
from torch import Tensor

from losslab.operators.accuracy import score_at
from losslab.operators.risk import EmpiricalRisk
from losslab.random import gaussian, make_generator

SIGMAS = 10.0 ** (np.arange(-80, 21) / 20)  # 10⁻⁴ to 10, fixed before any data is seen: the bound pays for the choice

Tick = Callable[[str], bool]  # after each forward pass; whether to go on


@dataclass(frozen=True)
class PacBayes:
    """A bound on the error of weights drawn from N(θ, σ²I), and how far σ can go. NaN where there is none.

    Attributes:
        sigma: The largest σ of the grid at which the expected rise is at most what was allowed; 0 where the smallest
            is too much already.
        next_sigma: The next one of the grid, where it is more; infinite where the grid ends.
        sigmas: (S,) where the rise was measured, ascending, `rises` and `rise_errors` with it.
        rises: (S,) E[L(θ + σz)] − L(θ), or that of the error rate, over samples.
        rise_errors: (S,) standard errors.
        gibbs_error: The training error of the drawn weights, the mean over samples drawn anew at `sigma`.
        loss_rise: The rise of the loss over the same samples, with its standard error `loss_rise_error`.
        loss_rise_error: See above.
        largest_rise: Its largest: the sharpness at distance σ√P.
        distance: ‖θ − θ₀‖ from the prior's centre.
        kl: The divergence of posterior from prior in nats, ‖θ − θ₀‖²/(2σ²).
        bound: With probability `confidence` over the training data the drawn weights' error on new data is at most so
            much.
    """

    sigma: float
    next_sigma: float
    sigmas: np.ndarray
    rises: np.ndarray
    rise_errors: np.ndarray
    gibbs_error: float
    loss_rise: float
    loss_rise_error: float
    largest_rise: float
    distance: float
    kl: float
    bound: float
    confidence: float

    def __str__(self) -> str:
        return f"error at most {self.bound:.4f} at {self.confidence:.0%}, σ = {self.sigma:.4g}"


def kl_inverse(error: float, limit: float) -> float:
    """The largest p with kl(q‖p) = q ln(q/p) + (1−q) ln((1−q)/(1−p)) ≤ c, for q = `error` and c = `limit`.

    >>> round(kl_inverse(0.0, 0.1), 6), round(kl_inverse(0.1, 0.05), 4)      # 1 − e⁻⁰·¹ where q is 0
    (0.095163, 0.2201)
    """
    if not (0 <= error <= 1 and limit >= 0):
        return math.nan

    def excess(p: float) -> float:
        return float(rel_entr(error, p) + rel_entr(1 - error, 1 - p)) - limit

    largest = 1 - 1e-15
    if error >= largest or excess(largest) <= 0:
        return 1.0
    return error if limit == 0 else float(brentq(excess, error, largest, xtol=1e-14))


def bound_of(gibbs_error: float, num_samples: int, kl: float, num_examples: int, confidence: float) -> float:
    """The bound, from the mean training error of `num_samples` draws; half of 1 − confidence goes to each of two steps.

    That of the m draws is not the posterior's: kl(mean‖e) ≤ ln(2/δ′)/m (Langford & Caruana 2002). For all J widths σ of
    the grid at once, kl(e‖error on new data) ≤ (KL + ln(2√n·J/δ))/n (Langford & Seeger 2001; the constant of Maurer
    2004).
    """
    delta = (1 - confidence) / 2
    posterior = kl_inverse(gibbs_error, math.log(2 / delta) / num_samples)
    return kl_inverse(posterior, (kl + math.log(2 * math.sqrt(num_examples) * len(SIGMAS) / delta)) / num_examples)


class Posterior:
    """Scores of weights θ + σz, always of the same z for the search, so that σ alone makes the difference.

    Attributes:
        by_error: Whether the rise is that of the error rate; else of the loss.
    """

    def __init__(self, risk: EmpiricalRisk, loss: float, accuracy: float, num_samples: int, seed: int, tick: Tick):
        self.risk, self.theta, self.num_samples = risk, risk.space.vector(), num_samples
        self.loss, self.error, self.seed, self.tick = loss, 1 - accuracy, seed, tick
        self.by_error = math.isfinite(accuracy)
        self.stopped = False
        self._rises: dict[int, tuple[float, float]] = {}  # place in the grid -> mean, standard error

    def search(self, allowed: float) -> int:
        """The last place in the grid where the rise is at most that, by bisection; −1 where it is none.

        Cost: 7 · num_samples forward passes.
        """
        low, high = -1, len(SIGMAS)
        while high - low > 1 and not self.stopped:
            middle = (low + high) // 2
            losses, errors = self.draw(float(SIGMAS[middle]))
            if self.stopped:
                break
            samples = errors - self.error if self.by_error else losses - self.loss
            self._rises[middle] = float(samples.mean()), standard_error(samples)
            low, high = (middle, high) if self._rises[middle][0] <= allowed else (low, middle)  # NaN is too much
        return low

    def measured(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """σ, rises and their standard errors, ascending."""
        places = sorted(self._rises)
        found = np.array([self._rises[place] for place in places]).reshape(-1, 2)
        return SIGMAS[places], found[:, 0].copy(), found[:, 1].copy()

    def draw(self, sigma: float, *, fresh: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Losses and error rates (num_samples,) at θ + σz; with `fresh` of other z than those of the search."""
        generator = make_generator(self.seed)
        if fresh:
            for _ in range(self.num_samples):
                self._noise(generator)
        losses, errors = np.full((2, self.num_samples), np.nan)
        for i in range(self.num_samples):
            score = score_at(self.risk, self.theta + sigma * self._noise(generator))
            losses[i], errors[i] = score.loss, 1 - score.accuracy
            if not self.tick(f"σ = {sigma:.3g}: loss {score.loss:.4g}"):
                self.stopped = i + 1 < self.num_samples or not fresh
                break
        return losses, errors

    def _noise(self, generator: torch.Generator) -> Tensor:
        return gaussian((self.risk.space.size,), generator).to(self.theta)


def pac_bayes(posterior: Posterior, allowed: float, centre: Tensor, confidence: float) -> PacBayes:
    """Search σ, draw anew there, bound. NaN where it was stopped before. Cost: 8 · num_samples forward passes."""
    place = posterior.search(allowed)
    known = not posterior.stopped
    sigma = float(SIGMAS[place]) if place >= 0 else 0.0
    distance = float((posterior.theta - centre).double().norm())
    nothing = np.full(posterior.num_samples, np.nan)
    losses, errors = posterior.draw(sigma, fresh=True) if known else (nothing, nothing)
    kl = (distance**2 / (2 * sigma**2) if sigma else math.inf) if known else math.nan
    if distance == 0 and known:
        kl = 0.0
    sigmas, mean_rises, rise_errors = posterior.measured()
    rises, gibbs = losses - posterior.loss, float(errors.mean())
    return PacBayes(
        sigma=sigma if known else math.nan,
        next_sigma=(float(SIGMAS[place + 1]) if place + 1 < len(SIGMAS) else math.inf) if known else math.nan,
        sigmas=sigmas,
        rises=mean_rises,
        rise_errors=rise_errors,
        gibbs_error=gibbs,
        loss_rise=float(rises.mean()),
        loss_rise_error=standard_error(rises),
        largest_rise=float(rises.max()),
        distance=distance,
        kl=kl,
        bound=bound_of(gibbs, posterior.num_samples, kl, posterior.risk.num_examples, confidence),
        confidence=confidence,
    )


def standard_error(samples: np.ndarray) -> float:
    """Of the mean; NaN for a single sample."""
    return float(samples.std(ddof=1)) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
