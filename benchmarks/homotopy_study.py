"""What is compared with what: the same grid of η₀ for every method, fresh seeds for the best, and how wide "best" is.

Everything here asks `Runs` for what it needs, so that the same functions do the study and read it back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from homotopy_methods import DEFAULT, EMERGING, FREQUENCY, METHODS, SCHEDULES, WARMED, Settings, settings_of
from homotopy_runs import Run
from homotopy_tasks import TASKS, Setting
from optimizer_cache import Missing, Runs
from optimizer_runs import FINAL_SEED, Record
from scipy import stats

from losslab.studies.compare.statistics import Estimate, difference_estimate

NEAR = 1.05  # of the smallest loss
STARTS = ((0, 0.5), (0, 1.0), (0, 2.0), (1, 1.0), (2, 1.0))  # seeds, and what the first weights are multiplied by
EARLY = 200  # steps in which a warm-up is looked for
COUNTS, FREQUENCIES = (8, 16, 32, None), (10, 25, FREQUENCY)
EMERGES = ("mnist", "cifar10", "sst2")


@dataclass(frozen=True)
class Width:
    """From which η₀ to which a loss is near the best; an end that is the grid's may lie further out."""

    low: float
    high: float
    open_low: bool
    open_high: bool

    @property
    def ratio(self) -> float:
        """Of its ends."""
        return self.high / self.low


def width(rates: Sequence[float], losses: Sequence[float], limit: float, worst: float) -> Width | None:
    """The range of η₀ around the smallest loss within which no loss is above `limit`; None where all are.

    Between two η₀ of the grid the logarithm of the loss is a straight line in that of η₀; a run that diverged counts as
    `worst`, the loss of who knows nothing, so that the line to it is as steep for all methods.
    """
    y = np.log(np.minimum(np.where(np.isfinite(losses), losses, worst), worst))
    x, bound = np.log(rates), math.log(limit)
    best = int(y.argmin())
    if y[best] > bound:
        return None

    def end(stride: int) -> tuple[float, bool]:
        at = best
        while 0 <= at + stride < len(y):
            if y[at + stride] > bound:
                share = (bound - y[at]) / (y[at + stride] - y[at])
                return float(np.exp(x[at] + share * (x[at + stride] - x[at]))), False
            at += stride
        return float(rates[at]), True

    (low, open_low), (high, open_high) = end(-1), end(1)
    return Width(low, high, open_low, open_high)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean and its 95 % interval (Student's t)."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2 or not np.isfinite(values).all():
        return Estimate(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - half, mean + half)


def ratio_estimate(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The geometric mean of the ratios of paired values, and its bootstrap interval."""
    found = difference_estimate(np.log(first), np.log(second))
    return Estimate(*(math.exp(value) for value in (found.value, found.low, found.high)))


@dataclass(frozen=True)
class Protocol:
    """How much of everything.

    Attributes:
        tuning_seeds: Of the grid.
        seeds: Final ones; None is the task's number.
        final_seed: The first of them: others than the usual tell what a choice made on these owes to chance.
        length: What all horizons are multiplied by.
        every: Each how many-th η₀ of the grids is taken.
    """

    tuning_seeds: int = 3
    seeds: int | None = None
    final_seed: int = FINAL_SEED
    length: float = 1.0
    every: int = 1


@dataclass(frozen=True)
class Study:
    """One task with one optimizer."""

    setting: Setting
    runs: Runs
    protocol: Protocol

    @property
    def rates(self) -> tuple[float, ...]:
        """The grid of η₀."""
        return self.setting.rates[:: self.protocol.every]

    @property
    def horizons(self) -> tuple[int, ...]:
        """Steps; most tasks have one horizon."""
        own = (TASKS[self.setting.task].horizon, *([self.setting.long] if self.setting.long else []))
        return tuple(max(4, round(self.protocol.length * steps)) for steps in own)

    @property
    def final_seeds(self) -> range:
        """Fresh ones, the same for all methods."""
        first = self.protocol.final_seed
        return range(first, first + (self.protocol.seeds or TASKS[self.setting.task].seeds))

    def settings(self, method: str) -> Settings:
        """What a method is for this optimizer."""
        return settings_of(method, self.setting.optimizer)

    def run(self, settings: Settings, lr: float, seed: int, horizon: int, scale: float = 1.0) -> Run:
        """One run of this task and optimizer."""
        own = {"lr": lr, **settings}
        return Run(self.setting.task, self.setting.optimizer, own, seed, horizon, scale=scale)

    # -- the grid -------------------------------------------------------------------------------------------

    def grid_runs(self, method: str, seed: int, horizon: int) -> list[Run]:
        """A method at all η₀."""
        return [self.run(self.settings(method), lr, seed, horizon) for lr in self.rates]

    def grid(self, method: str, horizon: int) -> np.ndarray:
        """Final validation losses (seeds, η₀) of the tuning seeds; those that are there, if not all may be started."""
        found = []
        for seed in range(self.protocol.tuning_seeds):
            try:
                found.append([record["loss"] for record in self.runs(self.grid_runs(method, seed, horizon))])
            except Missing:
                if not found:
                    raise
        return np.array(found)

    def best(self, method: str, horizon: int) -> tuple[float, float]:
        """η₀ of the smallest mean loss over the tuning seeds, and that loss."""
        means = self.grid(method, horizon).mean(0)
        return self.rates[int(means.argmin())], float(means.min())

    def chosen(self, names: Sequence[str], horizon: int) -> str:
        """The method of the smallest loss."""
        return min(names, key=lambda name: self.best(name, horizon)[1])

    def worst(self) -> float:
        """The loss of who knows nothing."""
        return math.log(2 if self.setting.task == "sst2" else 10) if TASKS[self.setting.task].classes else 1e3

    # -- fresh seeds ----------------------------------------------------------------------------------------

    def methods(self, horizon: int) -> list[str]:
        """Those whose grid is there, or may be made.

        Raises:
            Missing: Of none.
        """
        found, missing = [], Missing("")
        for name in METHODS:
            try:
                self.grid(name, horizon)
                found.append(name)
            except Missing as error:
                missing = error
        if not found:
            raise missing
        return found

    def contenders(self, horizon: int) -> list[str]:
        """Those that fresh seeds are spent on: of the warm-ups before a cosine only the best."""
        names = self.methods(horizon)
        warmed = [name for name in names if name in WARMED]
        kept = self.chosen(warmed, horizon) if warmed else None
        return [name for name in names if name == kept or name not in warmed]

    def final_runs(self, method: str, horizon: int) -> list[Run]:
        """A method at its best η₀."""
        lr, _ = self.best(method, horizon)
        return [self.run(self.settings(method), lr, seed, horizon) for seed in self.final_seeds]

    def final(self, method: str, horizon: int) -> list[Record]:
        """Their records."""
        return self.runs(self.final_runs(method, horizon))

    def rival(self, horizon: int, among: Sequence[str] = tuple(SCHEDULES)) -> str:
        """The best tuned schedule."""
        return self.chosen(among, horizon)

    # -- what estimates are worth, and what emerges ---------------------------------------------------------

    def cost_runs(self, examples: int | None, frequency: int) -> list[Run]:
        """The default rule at its best η₀ with other estimates."""
        horizon = self.horizons[0]
        lr, _ = self.best(DEFAULT, horizon)
        settings = {**self.settings(DEFAULT), "examples": examples, "frequency": frequency}
        return [self.run(settings, lr, seed, horizon) for seed in self.final_seeds]

    @property
    def emerges(self) -> bool:
        """Whether a warm-up is looked for here: on each data set with one optimizer."""
        task, optimizer = self.setting.task, self.setting.optimizer
        return task in EMERGES and (task == "sst2" or optimizer == "momentum")

    def emerging_runs(self) -> list[Run]:
        """From five initialisations, with nothing but curvature to set the rate."""
        steps = max(4, round(self.protocol.length * EARLY))
        return [self.run(EMERGING, self.rates[-1], seed, steps, scale) for seed, scale in STARTS]
