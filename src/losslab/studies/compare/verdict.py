"""The verdict: one sentence that a reader can repeat, and that claims no more than the numbers do."""

import math

from losslab.studies.compare.plan import LEAST_SEEDS
from losslab.studies.compare.result import Comparison, Contender, Pairing
from losslab.studies.compare.statistics import Estimate


def target_in_words(metric: str, value: float) -> str:
    """The target as a sentence names it: "97 % validation accuracy", "a validation loss of 0.05"."""
    name = metric.replace("_", " ")
    return f"{100 * value:.4g} % {name}" if metric.endswith("accuracy") else f"a {name} of {value:.4g}"


def verdict(comparison: Comparison, pair: Pairing) -> str:
    """The sentence on one optimizer against the baseline.

    A factor, of steps or of time, stands only where its interval excludes 1 and the paired test says as much as so many
    seeds can say.
    """
    first, second = comparison.contender(pair.first), comparison.contender(pair.second)
    if math.isnan(comparison.target) and (comparison.status.ok or second.runs == len(comparison.seeds)):
        return (
            f"No verdict on {first.name}: too many of {second.name}'s runs diverged or failed, so that the median of "
            "their values at the end, the target, is not known."
        )
    if math.isnan(comparison.target):
        return f"No verdict on {first.name} yet: the target, the median of {second.name}'s runs, needs them all."
    if pair.n < (LEAST_SEEDS if comparison.status.ok else len(comparison.seeds)):  # a run that failed is missing
        return f"No verdict on {first.name} yet: {pair.n} of {len(comparison.seeds)} seeds are done."
    goal = target_in_words(comparison.metric, comparison.target)
    medians = (first.median_steps.value, second.median_steps.value)
    if not (all(map(math.isfinite, medians)) and 0 < pair.steps_ratio.value < math.inf):  # of all seeds, of the pairs
        return _without_ratio(comparison, first, second, goal)
    missed = "".join(_missed(contender) for contender in (first, second))
    if not pair.significant:
        return (
            f"No significant difference between {first.name} and {second.name} in the steps to {goal}: "
            f"{_factor(pair.steps_ratio)}, n = {pair.n}{missed}."
        )
    steps = f"{first.name} reached {goal} in {_factor(pair.steps_ratio)} of {second.name}'s steps"
    return f"{steps} {_time(pair)}, n = {pair.n}{missed}."


def _time(pair: Pairing) -> str:
    """The time, beside a claim on the steps: the same direction, the other one, or no difference."""
    factor = _factor(pair.seconds_ratio)
    if not pair.significant_in_time:
        return f"with no significant difference in time ({factor})"
    same = (pair.seconds_ratio.value < 1) == (pair.steps_ratio.value < 1)
    return f"{'and' if same else 'but'} {factor} of its time"


def _without_ratio(comparison: Comparison, first: Contender, second: Contender, goal: str) -> str:
    """Where half of the runs of one of them, or more, never arrived: counts instead of a factor."""
    within = f"within {comparison.horizon} steps"
    if first.reached == second.reached == 0:
        return f"Neither {first.name} nor {second.name} reached {goal} {within}, n = {first.runs}."
    for loser, other in ((first, second), (second, first)):
        if loser.reached == 0:
            return (
                f"{loser.name} never reached {goal} {within}; {other.name} did with {other.reached} of {other.runs} "
                f"seeds, n = {other.runs}."
            )
    counts = " and ".join(f"{each.name} with {each.reached} of {each.runs} seeds" for each in (first, second))
    return f"Too few runs reached {goal} {within} to state a factor: {counts}."


def _missed(contender: Contender) -> str:
    missed = contender.runs - contender.reached
    return f"; {missed} of {contender.runs} runs of {contender.name} missed it and count as slowest" if missed else ""


def _factor(ratio: Estimate) -> str:
    """A ratio with its interval: 0.38× [0.31, 0.47]."""
    return f"{_short(ratio.value)}× [{_short(ratio.low)}, {_short(ratio.high)}]"


def _short(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.2f}" if value < 10 else f"{value:.3g}"
