"""The smallest dimension whose training reaches a goal: what the goal is, and the bisection on log d."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from losslab.probes.subspaces.trainings import FULL, Trainings, Trial

Baseline = float | Literal["full"]
_RESAMPLES = 10_000  # of the bootstrap: its 2.5 % is then known to 0.2 %


@dataclass(frozen=True)
class Goal:
    """What counts as solved: `measure` ("accuracy" or "loss") on `split` reaches `threshold`.

    The threshold is `target` · baseline for accuracies, and start − `target` · (start − baseline) for losses.
    """

    measure: str
    split: str
    target: float
    start_score: float = math.nan
    baseline: float = math.nan
    baseline_kind: str = "full"
    threshold: float = math.nan

    def score(self, trial: Trial) -> float:
        """What is measured of a training."""
        score = trial.train if trial.validation is None else trial.validation
        return score.accuracy if self.measure == "accuracy" else score.loss

    def mean(self, trials: Sequence[Trial]) -> float:
        """The mean score; NaN of none."""
        return float(np.mean([self.score(trial) for trial in trials])) if trials else math.nan

    def reached(self, trial: Trial) -> bool:
        """Whether a training solved it; one whose loss is NaN did not."""
        score = self.score(trial)
        return score >= self.threshold if self.measure == "accuracy" else score <= self.threshold


def goal_of(trainings: Trainings, seeds: Sequence[int], measure: str, target: float, baseline: Baseline) -> Goal:
    """One threshold for all seeds: they differ by their luck, not by what is asked of them.

    Args:
        trainings: Of the network; those of all parameters are made here where they are the baseline.
        seeds: Over which is averaged.
        measure: "accuracy", "loss", or "auto" for accuracy where there is one.
        target: Share of the baseline.
        baseline: "full" or a number.

    Raises:
        ValueError: "accuracy" where there is none; target or baseline out of range.
    """
    if not 0 < target <= 1:
        raise ValueError(f"target: expected a share of the baseline in (0, 1], got {target!r}")
    if baseline != "full" and (isinstance(baseline, str | bool) or not math.isfinite(baseline)):
        raise ValueError(f"baseline: expected 'full' or a number, got {baseline!r}")
    starts = [trainings.trial(0, seed) for seed in seeds]
    goal = Goal("accuracy", "train" if trainings.validation is None else "validation", target)
    has_accuracy = not math.isnan(goal.score(starts[0]))
    if measure == "accuracy" and not has_accuracy:
        raise ValueError(
            "measure: expected class scores with class indices as targets for 'accuracy', got others; use 'loss'"
        )
    if measure == "loss" or not has_accuracy:
        goal = replace(goal, measure="loss")
    start = goal.mean(starts)
    if baseline == "full":
        full, kind = goal.mean([trainings.trial(FULL, seed) for seed in seeds]), "full"
    else:
        full, kind = float(baseline), "given"
    threshold = target * full if goal.measure == "accuracy" else start - target * (start - full)
    return replace(goal, start_score=start, baseline=full, baseline_kind=kind, threshold=threshold)


def dimensions_up_to(largest: int, resolution: float) -> list[int]:
    """The dimensions to choose from: 0, 1, and on in ratios of 1 + resolution, or by one where that is more.

    >>> dimensions_up_to(16, 0.2)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16]
    """
    grid, dimension = [0], 1
    while dimension < largest:
        grid.append(dimension)
        dimension = max(dimension + 1, int(dimension * (1 + resolution)))
    return [*grid, largest]


def smallest_dimension(trainings: Trainings, goal: Goal, dimensions: Sequence[int], seed: int) -> float:
    """The first of the dimensions that reaches the goal, by bisection over their places; Inf where none does.

    Cost: at most `len(dimensions).bit_length()` trainings.
    """
    place = bisect.bisect_left(dimensions, True, key=lambda dimension: goal.reached(trainings.trial(dimension, seed)))
    return dimensions[place] if place < len(dimensions) else math.inf


def bootstrap_interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """95 % for the mean, by the percentile bootstrap; NaN of fewer than two values.

    Its ends are means that were drawn, not interpolated ones, so that Inf stays Inf.
    """
    if len(values) < 2:
        return math.nan, math.nan
    chosen = np.random.default_rng(seed).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.quantile(np.array(values)[chosen].mean(1), [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)
