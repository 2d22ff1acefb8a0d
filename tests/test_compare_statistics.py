"""What a handful of seeds says: against closed forms, full enumeration, and numbers worked out by hand."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from losslab.studies.compare.statistics import (
    RESAMPLES,
    Estimate,
    difference_estimate,
    holm,
    median,
    median_estimate,
    paired_test,
    profile,
    ratio_estimate,
    share_near_best,
    smallest_p,
)

INF = math.inf


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([30, 10, 20], 20),
        ([10, 20, INF, 30, INF], 30),  # two of five missed: the third to arrive is the median
        ([10, INF, INF, 30, INF], INF),  # three missed
        ([10, 20, INF, INF], INF),  # half: nobody knows the upper of the two in the middle
        ([10, 20, 30, INF], 25),
        ([INF] * 3, INF),
    ],
)
def test_censored_medians(times, expected):
    assert median(times) == expected


def test_dropping_the_missing_runs_would_flatter():
    times = [10.0, 20.0, INF, INF, 30.0]
    assert median(times) > np.median([t for t in times if math.isfinite(t)])


def test_the_median_is_kaplan_meiers():
    """The first time at which the product of the shares still on their way is at most one half."""
    times = np.array([7.0, 3.0, 9.0, INF, 4.0])
    surviving = 1.0
    arrivals = iter(sorted(times[np.isfinite(times)]))
    at_risk = len(times)
    while surviving > 0.5:
        arrived = next(arrivals)
        surviving *= 1 - 1 / at_risk
        at_risk -= 1
    assert median(times) == arrived == 7.0


def test_five_runs_give_the_whole_range():
    """A resample's median is the smallest of five with probability 0.058 > 0.025: no end lies inside."""
    assert 1 - stats.binom.cdf(2, 5, 1 / 5) == pytest.approx(0.058, abs=1e-3)
    assert median_estimate([5.0, 1.0, 4.0, 2.0, 3.0]) == Estimate(3.0, 1.0, 5.0)
    assert median_estimate([5.0, INF, 4.0, 2.0, INF]) == Estimate(5.0, 2.0, INF)


def test_the_bootstrap_distribution_of_a_median_is_the_exact_one():
    """Seven values: all 7⁷ resamples in closed form, by binomial tails, against the interval's ends."""
    values = np.arange(7.0)

    def median_at_most(k: int) -> float:  # four of seven draws or more among the k + 1 smallest
        return 1 - stats.binom.cdf(3, 7, (k + 1) / 7)

    ends = [next(k for k in range(7) if median_at_most(k) >= level) for level in (0.025, 0.975)]
    estimate = median_estimate(values)
    assert [estimate.low, estimate.high] == ends == [1, 5]


def test_coverage_is_what_theory_says():
    """Five runs of a known distribution: the range holds the true median with probability 1 − 2/2⁵ = 0.9375."""
    rng, samples = np.random.default_rng(0), 200
    held = 0
    for _ in range(samples):
        estimate = median_estimate(rng.exponential(size=5))
        held += estimate.low <= math.log(2) <= estimate.high
    deviation = math.sqrt(0.9375 * 0.0625 / samples)
    assert abs(held / samples - 0.9375) < 3 * deviation


def test_false_claims_are_rare_at_five_seeds():
    """Two equal optimizers: all five seeds agree in one case of sixteen, and no claim is made where they do not."""
    rng, samples = np.random.default_rng(1), 100
    claims = 0
    for _ in range(samples):
        first, second = rng.lognormal(0, 0.3, (2, 5))
        p = paired_test(first, second)
        claims += ratio_estimate(first, second).excludes_one and p <= max(0.05, smallest_p(5))
    assert claims / samples < 1 / 16 + 3 * math.sqrt(15) / 16 / math.sqrt(samples)


def test_ratios_are_resampled_by_pairs():
    """One seed slow for both: the ratio is 1/2 in every resample, which unpaired resampling would not see."""
    second = np.array([100.0, 400.0, 900.0, 250.0, 2000.0])
    assert ratio_estimate(second / 2, second) == Estimate(0.5, 0.5, 0.5)


def test_a_ratio_of_unknowns_widens_the_interval():
    estimate = ratio_estimate([3.0, 4.0, 5.0, INF, 7.0], [10.0, 9.0, INF, INF, INF])
    assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, INF)
    assert not estimate.excludes_one
    nothing = ratio_estimate([INF] * 5, [INF] * 5)
    assert math.isnan(nothing.value)
    assert (nothing.low, nothing.high) == (0.0, INF)


def test_differences_are_bca_and_know_no_spread_and_no_infinity():
    first, second = np.array([1.0, 2.0, 3.0, 4.0, 9.0, 30.0]), np.zeros(6)
    estimate = difference_estimate(first, second)
    interval = stats.bootstrap(
        (first,), np.mean, method="BCa", n_resamples=RESAMPLES, random_state=np.random.default_rng(0)
    ).confidence_interval
    assert estimate == Estimate(first.mean(), interval.low, interval.high)
    assert estimate.high - estimate.value > estimate.value - estimate.low  # the long tail is on the right
    assert difference_estimate([2.0, 3.0], [1.0, 2.0]) == Estimate(1.0, 1.0, 1.0)
    assert math.isnan(difference_estimate([1.0, INF], [1.0, 2.0]).value)


def signed_rank_p(first, second) -> float:
    """All 2ⁿ exchanges, one by one: twice the smaller tail."""
    differences = [0.0 if a == b else a - b for a, b in zip(first, second, strict=True)]
    ranks = stats.rankdata(np.abs(differences))
    observed = float(np.sign(differences) @ ranks)
    sums = [
        float(np.array(signs) @ (np.sign(differences) * ranks))
        for signs in itertools.product((1, -1), repeat=len(ranks))
    ]
    tails = [sum(s <= observed + 1e-9 for s in sums), sum(s >= observed - 1e-9 for s in sums)]
    return min(1.0, 2 * min(tails) / len(sums))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]),
        ([1, 2, 3, 4, 50], [2, 4, 6, 8, 10]),
        ([1, 2, 3, 4, 5], [2, 3, 4, 5, 6]),  # ties
        ([1, 2, INF, 4, 5, 6], [2, 1, 3, INF, 9, 9]),
        ([1, 2, INF, 4, 5, 6], [2, 4, INF, INF, 9, 9]),  # a seed that neither reached
        ([INF] * 5, [INF] * 5),
    ],
)
def test_small_sample_p_values_by_enumeration(first, second):
    assert paired_test(first, second) == pytest.approx(signed_rank_p(first, second))


def test_without_ties_it_is_wilcoxons_exact_test():
    first, second = np.array([3.0, 1.5, 8.0, 2.0, 7.0, 9.5, 4.0]), np.array([2.0, 4.0, 3.1, 9.0, 1.0, 2.2, 0.7])
    assert paired_test(first, second) == pytest.approx(stats.wilcoxon(first, second, method="exact").pvalue)


def test_the_smallest_p_of_five_seeds():
    assert smallest_p(5) == paired_test([1, 2, 3, 4, 5], [9, 9, 9, 9, 9]) == 0.0625
    assert smallest_p(6) < 0.05


def test_holm_by_hand():
    # Holm (1979): sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, and never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_profiles_by_hand():
    times = {"a": [10.0, 20.0, 40.0, INF], "b": [20.0, 20.0, INF, INF]}
    shares = profile(times, np.array([1.0, 1.5, 2.0, 4.0]))
    assert shares["a"].tolist() == [0.75, 0.75, 0.75, 0.75]  # the best wherever anybody arrived
    assert shares["b"].tolist() == [0.25, 0.25, 0.5, 0.5]


def test_share_near_the_best():
    assert share_near_best([1.0, 0.96, 0.94, math.nan], larger_is_better=True) == 0.5
    assert share_near_best([1.0, 1.04, 1.06, INF], larger_is_better=False) == 0.5
    assert share_near_best([math.nan, INF], larger_is_better=False) == 0.0
    assert share_near_best([0.0, 0.0], larger_is_better=True) == 0.0  # all diverged
