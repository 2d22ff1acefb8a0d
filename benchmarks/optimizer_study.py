"""How the optimizer study compares: equal tuning, a target, the horizon that reaches it, paired seeds, step times.

Everything here asks `Runs` for what it needs, so that the same functions do the study and read it back.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optimizer_cache import Runs
from optimizer_runs import FINAL_SEED, Record, Run
from optimizer_tasks import Task
from scipy.stats import qmc

from losslab.studies.compare.statistics import Estimate
from losslab.studies.spaces import SPACES, Choice, Range, Space

BASELINES = ("momentum", "adamw")
RIVALS = (*BASELINES, "soap", "shampoo", "muon", "schedule_free")
OPTIMIZERS = (*RIVALS, "talt")
DECADE, MORE, EXTENSIONS = 10.0, 4, 2  # by what a range of learning rates grows, trials there, how often at most
LOWEST, HIGHEST = -6, 2  # horizons are T·2^(k/2) for k from the one to the other
Settings = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """How much of everything; a study of its own, since other numbers give other runs.

    Attributes:
        trials: Settings tried for each optimizer.
        again: How many of the best are run with more seeds.
        tuning_seeds: The first is for all trials.
        seeds: Final ones; None is the task's number.
        length: What all horizons are multiplied by.
    """

    trials: int = 16
    again: int = 3
    tuning_seeds: int = 5
    seeds: int | None = None
    length: float = 1.0

    def horizon(self, task: Task, k: int = 0) -> int:
        """T·2^(k/2), in steps."""
        return max(2, round(self.length * task.horizon * 2 ** (k / 2)))

    def final_seeds(self, task: Task) -> range:
        """Fresh ones, the same for all optimizers."""
        return range(FINAL_SEED, FINAL_SEED + (self.seeds or task.seeds))


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Attributes:
        settings: The best.
        loss: Their mean over the tuning seeds.
        next_best: The smallest such mean of any other settings.
        trials: All settings that were tried, with the loss of the first seed.
        low: End of the range of learning rates, after it was extended.
        high: The other end.
    """

    settings: Settings
    loss: float
    next_best: float
    trials: tuple[tuple[Settings, float], ...]
    low: float
    high: float


def space_of(optimizer: str) -> Space:
    """Where its settings are searched."""
    return {name.removeprefix("optimizer."): entry for name, entry in SPACES[optimizer].items()}


def draw(space: Space, count: int, seed: int) -> list[Settings]:
    """Settings that fill a space evenly: the first points of a scrambled Sobol sequence."""
    points = qmc.Sobol(len(space), seed=seed).random_base2(math.ceil(math.log2(count)))[:count]
    return [{name: _at(entry, u) for (name, entry), u in zip(space.items(), row, strict=True)} for row in points]


def _at(entry: Range | Choice, u: float) -> Any:
    if isinstance(entry, Choice):
        value = entry.values[int(u * len(entry.values))]
        return list(value) if isinstance(value, tuple) else value
    value = entry.low * (entry.high / entry.low) ** u if entry.log else entry.low + u * (entry.high - entry.low)
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Study:
    """One task's comparison."""

    task: Task
    runs: Runs
    protocol: Protocol

    def losses(self, optimizer: str, settings: Sequence[Settings], seeds: Sequence[int], k: int = 0) -> np.ndarray:
        """Final validation losses (settings, seeds)."""
        horizon = self.protocol.horizon(self.task, k)
        wanted = [Run(self.task.name, optimizer, each, seed, horizon) for each in settings for seed in seeds]
        return np.array([record["loss"] for record in self.runs(wanted)]).reshape(len(settings), len(seeds))

    def tuned(self, optimizer: str) -> Tuned:
        """The best settings: quasi-random trials with one seed, the best of them again with more.

        Where the best learning rate is the smallest or the largest of all, a decade more is searched beyond it, twice
        at most.
        """
        space, seeds = space_of(optimizer), range(self.protocol.tuning_seeds)
        rates = space["lr"]
        assert isinstance(rates, Range)
        low, high = rates.low, rates.high
        trials = draw(space, self.protocol.trials, seed=0)
        for extension in range(EXTENSIONS + 1):
            first = self.losses(optimizer, trials, seeds[:1])[:, 0]
            order = np.argsort(first, kind="stable")
            best, tried = trials[order[0]]["lr"], [each["lr"] for each in trials]
            if min(tried) < best < max(tried) or extension == EXTENSIONS:
                break
            down = best == min(tried)
            fresh = Range(low / DECADE, low, log=True) if down else Range(high, high * DECADE, log=True)
            low, high = min(low, fresh.low), max(high, fresh.high)
            trials += draw({**space, "lr": fresh}, MORE, seed=extension + 1)
        again = [trials[index] for index in order[: self.protocol.again]]
        means = self.losses(optimizer, again, seeds).mean(1)
        results = tuple(zip(trials, map(float, first), strict=True))
        best = int(means.argmin())
        others = np.delete(means, best)
        return Tuned(again[best], float(means[best]), float(others.min(initial=math.inf)), results, low, high)

    def final(self, optimizer: str, k: int = 0) -> list[Record]:
        """The records of the final seeds with the tuned settings."""
        settings, horizon = self.tuned(optimizer).settings, self.protocol.horizon(self.task, k)
        seeds = self.protocol.final_seeds(self.task)
        return self.runs([Run(self.task.name, optimizer, settings, seed, horizon) for seed in seeds])

    def target(self, among: Sequence[str] = BASELINES) -> tuple[float, str]:
        """The best one's median of the final losses at T, and which that is."""
        medians = {name: statistics.median(record["loss"] for record in self.final(name)) for name in among}
        best = min(medians, key=lambda name: medians[name])
        return medians[best], best

    def arrivals(self, optimizer: str, target: float) -> np.ndarray:
        """For each final seed, the horizon at which the target is met, between two of the grid; infinite where none.

        The grid's smallest horizon whose median meets the target is looked for by bisection; from there each seed goes
        its own way down to the first horizon that misses, or up to the first that meets it.
        """
        settings = [self.tuned(optimizer).settings]
        seeds = list(self.protocol.final_seeds(self.task))
        low, high = (
            (LOWEST - 1, 0) if np.median(self.losses(optimizer, settings, seeds)) <= target else (0, HIGHEST + 1)
        )
        while high - low > 1:
            middle = (low + high) // 2
            met = np.median(self.losses(optimizer, settings, seeds, middle)) <= target
            low, high = (low, middle) if met else (middle, high)
        start = min(high, HIGHEST)
        found = {seed: self._arrival(optimizer, settings, seed, start, target) for seed in self.runs.shuffled(seeds)}
        return np.array([found[seed] for seed in seeds])

    def _arrival(self, optimizer: str, settings: list[Settings], seed: int, k: int, target: float) -> float:
        def loss(k: int) -> float:
            return float(self.losses(optimizer, settings, [seed], k)[0, 0])

        if loss(k) <= target:
            while k > LOWEST and loss(k - 1) <= target:
                k -= 1
            if k == LOWEST:
                return float(self.protocol.horizon(self.task, k))
        else:
            while k <= HIGHEST and loss(k) > target:
                k += 1
            if k > HIGHEST:
                return math.inf
        missed, met = loss(k - 1), loss(k)
        share = (missed - target) / (missed - met) if math.isfinite(missed) else 1.0
        steps = [self.protocol.horizon(self.task, each) for each in (k - 1, k)]
        return float(steps[0] * (steps[1] / steps[0]) ** share)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """A ratio of steps times one of step times."""
    return replace(estimate, **{end: getattr(estimate, end) * factor for end in ("value", "low", "high")})


def claim(estimate: Estimate) -> str:
    """What may be said of a ratio: no factor that its whole interval does not exceed."""
    if estimate.high == 0:
        return "arrives where the other never does"
    factor = math.floor(10 / estimate.high) / 10
    if factor > 1:
        return f"at least {factor:.1f}× faster"
    if estimate.excludes_one:
        return "faster" if estimate.high < 1 else "slower"
    return "no significant difference"
