"""What a handful of seeds can and cannot say: medians with runs that never arrived, intervals, tests, profiles.

Pure functions on small arrays. In a sample of times +inf is a run that did not reach the target; NaN is not allowed.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

LEVEL = 0.95
RESAMPLES = 9999
_ENDS = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)
Statistic = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval, each infinite where runs that never arrived decide it; NaN: not known."""

    value: float
    low: float
    high: float

    @property
    def excludes_one(self) -> bool:
        """Whether a ratio of 1 lies outside the interval; false where an end is not known."""
        return self.low > 1 or self.high < 1


def median(times: Sequence[float] | np.ndarray, axis: int | None = None) -> np.ndarray:
    """When had half of the runs arrived? Infinite where half or more of them never did.

    All runs are watched for the same number of steps, so that whoever is missing is slower than whoever arrived: the
    Kaplan–Meier estimate of the median is then the plain order statistic, with the missing ones last.
    """
    with np.errstate(invalid="ignore"):
        return np.median(np.asarray(times, dtype=float), axis=axis)


def median_estimate(times: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """The median and its percentile bootstrap interval over the runs.

    With five runs the interval is the whole range, which holds the median with probability 1 − 2/2⁵ = 0.9375 whatever
    the distribution. An end is infinite where more than 2.5 % of the resamples have an infinite median.
    """
    times = np.asarray(times, dtype=float)
    return _percentile((times,), median, seed)


def ratio_estimate(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, seed: int = 0
) -> Estimate:
    """By what factor is the first one's median time that of the second? Resampled by pairs (a seed is a pair).

    A resample in which both medians are infinite says nothing, so it counts as 0 for the lower end and as infinite for
    the upper one: ignorance widens the interval, never narrows it.
    """
    return _percentile((np.asarray(first, dtype=float), np.asarray(second, dtype=float)), _ratio, seed)


def difference_estimate(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, seed: int = 0
) -> Estimate:
    """The mean difference of paired values and its BCa bootstrap interval; NaN where a value is not finite.

    Source: B. Efron, "Better bootstrap confidence intervals", J. Amer. Statist. Assoc. 82 (1987) 171.
    """
    with np.errstate(invalid="ignore"):
        differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    value = float(differences.mean()) if np.isfinite(differences).all() else np.nan
    if not np.isfinite(value):
        return Estimate(np.nan, np.nan, np.nan)
    if np.ptp(differences) == 0:  # BCa divides by the spread; one point's interval is itself
        return Estimate(value, value, value)
    interval = _bootstrap((differences,), np.mean, "BCa", seed).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def _percentile(samples: tuple[np.ndarray, ...], statistic: Statistic, seed: int) -> Estimate:
    """The statistic with the percentiles of its resamples, which are order statistics: inf is never interpolated."""
    value = float(statistic(*samples, axis=-1))
    drawn = _bootstrap(samples, statistic, "percentile", seed).bootstrap_distribution
    unknown = np.isnan(drawn)
    low = np.quantile(np.where(unknown, 0.0, drawn), _ENDS[0], method="inverted_cdf")
    high = np.quantile(np.where(unknown, np.inf, drawn), _ENDS[1], method="inverted_cdf")
    return Estimate(value, float(low), float(high))


def _bootstrap(samples: tuple[np.ndarray, ...], statistic: Statistic, method: str, seed: int) -> Any:
    # scipy warns where an interval does not exist (infinite times, no spread): NaN says so, and is dealt with above.
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        return scipy.stats.bootstrap(
            samples,
            statistic,
            paired=len(samples) > 1,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method=method,
            random_state=np.random.default_rng(seed),
        )


def _ratio(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return median(first, axis) / median(second, axis)


def paired_test(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """How likely are paired times as different as these, in either direction, if the two are alike?

    The signed-rank statistic (Wilcoxon) under all 2ⁿ exchanges within pairs; from 14 pairs on, under 9,999 random ones.
    A pair of which one run never arrived has the largest difference, one of which neither did has none; ties share
    ranks. No smaller p than `smallest_p(n)` is possible.
    """
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    with np.errstate(invalid="ignore"):
        differences = np.where(first == second, 0.0, first - second)
    signed = np.sign(differences) * scipy.stats.rankdata(np.abs(differences))
    if not signed.any():
        return 1.0
    result = scipy.stats.permutation_test(
        (signed,),
        lambda ranks, axis: np.sum(ranks, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        random_state=np.random.default_rng(0),
    )
    return float(result.pvalue)


def smallest_p(pairs: int) -> float:
    """The smallest p that the test can give, that of 2 among 2ⁿ exchanges: all pairs agree. For n = 5 it is 0.0625."""
    return 2.0 / 2**pairs


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, corrected so that one false alarm among them all has probability ≤ α.

    Source: S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6 (1979) 65.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for done, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[index]))
        corrected[index] = largest
    return corrected


def profile(times: Mapping[str, Sequence[float] | np.ndarray], factors: np.ndarray) -> dict[str, np.ndarray]:
    """On what share of the problems (here: seeds) is each within a factor of the best? One curve for each.

    A run that never arrived is within no factor, also where no other arrived either.

    Source: E. Dolan, J. Moré, "Benchmarking optimization software with performance profiles", Math. Program. 91 (2002)
    201; in use in G. Dahl et al., "Benchmarking neural network training algorithms", arXiv:2306.07179.
    """
    table = np.array([np.asarray(row, dtype=float) for row in times.values()])
    with np.errstate(invalid="ignore"):
        ratios = np.where(np.isfinite(table), table / table.min(axis=0), np.inf)
    shares = (ratios[:, :, None] <= np.asarray(factors)).mean(axis=1)
    return dict(zip(times, shares, strict=True))


def share_near_best(values: Sequence[float] | np.ndarray, *, larger_is_better: bool, within: float = 0.05) -> float:
    """Which part of the settings tried ends within 5 % of the best of them? What is not finite is not near.

    An accuracy of 0 is a diverged run's, and near nothing either.
    """
    values = np.asarray(values, dtype=float).ravel()
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0
    near = (
        (finite > 0) & (finite >= (1 - within) * finite.max())
        if larger_is_better
        else finite <= (1 + within) * finite.min()
    )
    return float(near.sum() / values.size)
