"""From the run folders of a comparison to its numbers. Nothing is trained here: what a folder lacks is NaN."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from losslab.status import Status
from losslab.studies.compare import statistics
from losslab.studies.compare.layout import Layout
from losslab.studies.compare.plan import CompareConfig, GoalConfig
from losslab.studies.compare.result import UNKNOWN, Comparison, Contender, Pairing
from losslab.studies.compare.verdict import verdict
from losslab.studies.record import RunFolder
from losslab.studies.section import reaches
from losslab.studies.tuning.result import Tuned, warnings_about


@dataclass(frozen=True)
class SeedRun:
    """One finished run: its rows of the validation split and its final row."""

    rows: list[dict[str, Any]]
    last: dict[str, Any]
    goal: GoalConfig

    @classmethod
    def read(cls, path: Path, goal: GoalConfig) -> "SeedRun | None":
        """The run in a folder; None where it is not finished."""
        folder = RunFolder(path)
        last = folder.final if folder.is_run() else None
        rows = [row for row in folder.metrics() if row.get("kind") == "epoch"] if last is not None else []
        return None if last is None else cls(rows, last, goal)

    @property
    def diverged(self) -> bool:
        """Whether the training loss stopped being finite: the target is then not reached, whatever was before."""
        return self.last.get("status") == "diverged"

    def values(self) -> list[float]:
        """The metric at each evaluation; what is not finite is as bad as can be."""
        worst = 0.0 if self.goal.larger_is_better else math.inf
        values = [row.get(self.goal.metric) for row in self.rows]
        return [value if value is not None and math.isfinite(value) else worst for value in values]

    def until(self, target: float, column: str) -> float:
        """Steps, epochs or seconds to the first evaluation that reaches the target; infinite where none does."""
        if math.isnan(target):
            return math.nan
        for row, value in zip(self.rows, self.values(), strict=True):
            if not self.diverged and reaches(self.goal.metric, value, target):
                return float(row[column])
        return math.inf

    def final_value(self) -> float:
        """The metric at the end."""
        if self.diverged or not self.rows:
            return 0.0 if self.goal.larger_is_better else math.inf
        return self.values()[-1]

    def step_seconds(self) -> float:
        """Mean time of a step. A median would leave out what an optimizer does now and then: bases, estimates."""
        return self.rows[-1]["seconds"] / self.rows[-1]["step"] if self.rows else math.nan

    def best_value(self) -> float:
        """The best value on the way."""
        return (max if self.goal.larger_is_better else min)(self.values(), default=math.nan)

    def number(self, key: str) -> float:
        """A number of the final row; NaN where it has none."""
        value = self.last.get(key)
        return math.nan if value is None else float(value)


def measured(
    plan: CompareConfig,
    folder: str | Path,
    tuned: Mapping[str, Tuned],
    status: Status,
    failures: Sequence[str] = (),
    *,
    examples: int = 0,
) -> Comparison:
    """All that the folder's runs say, with the verdicts.

    Args:
        plan: What was asked for.
        folder: The study folder.
        tuned: What tuning chose, for the optimizers that have got so far.
        status: How the comparison ended.
        failures: Runs that ended with an error, a line each.
        examples: Of the validation split; 0 if not known.
    """
    layout = Layout(Path(folder), plan)
    runs = {
        name: [SeedRun.read(layout.seed_run(name, seed), plan.target) for seed in plan.seeds] for name in plan.names
    }
    baseline = baseline_of(plan, tuned)
    target = plan.target.value
    if target is None:
        target = _median_final(runs[baseline], whole=status.ok)
    contenders = [_contender(plan, layout, name, tuned.get(name), runs[name], target) for name in plan.names]
    found = Comparison(
        status=status,
        metric=plan.target.metric,
        target=target,
        automatic=plan.target.value is None,
        baseline=baseline,
        horizon=max((int(run.last["step"]) for each in runs.values() for run in each if run is not None), default=0),
        seeds=plan.seeds,
        tuning_seed=plan.base.seed,
        trials=plan.trials,
        machine=_machine(layout, plan),
        failures=tuple(failures),
        validation_examples=examples,
        contenders=tuple(contenders),
        pairs=tuple(pairings(contenders, baseline)),
    )
    against = [pair for pair in found.pairs if pair.second == baseline]
    return dataclasses.replace(found, verdicts=tuple(verdict(found, pair) for pair in against))


def baseline_of(plan: CompareConfig, tuned: Mapping[str, Tuned]) -> str:
    """What the others are compared with: of several names the one that tuning found best."""
    names = plan.baseline or (plan.names[0],)
    sign = -1 if plan.target.larger_is_better else 1
    known = [name for name in names if name in tuned and not math.isnan(tuned[name].value)]

    def place(name: str) -> tuple[float, float]:
        best = tuned[name].best_trial
        return best.reached if best is not None else math.inf, sign * tuned[name].value

    return min(known, key=place, default=names[0])


def _median_final(runs: Sequence[SeedRun | None], *, whole: bool) -> float:
    """AlgoPerf's target: the baseline's median value at the end; NaN while runs are to come, or if half diverged."""
    there = [run for run in runs if run is not None]
    if 2 * sum(run.diverged for run in there) >= len(there) or not (whole or len(there) == len(runs)):
        return math.nan
    return float(np.median([run.final_value() for run in there]))


def _contender(
    plan: CompareConfig, layout: Layout, name: str, tuned: Tuned | None, runs: Sequence[SeedRun | None], target: float
) -> Contender:
    def column(value: Any) -> tuple[float, ...]:
        return tuple(math.nan if run is None else float(value(run)) for run in runs)

    steps = column(lambda run: run.until(target, "step"))
    epochs = column(lambda run: run.until(target, "epoch"))
    seconds = column(lambda run: run.until(target, "seconds"))
    best = tuned.best_trial if tuned is not None else None
    return Contender(
        name=name,
        tuned=dict(best.parameters) if best is not None else {},
        warnings=warnings_about(tuned.trials, best, plan.space(name), {}) if tuned is not None else (),
        trials=len(tuned.trials) if tuned is not None else 0,
        tuned_value=tuned.value if tuned is not None else math.nan,
        steps=steps,
        epochs=epochs,
        seconds=seconds,
        final=column(SeedRun.final_value),
        best=column(SeedRun.best_value),
        test_loss=column(lambda run: run.number("test_loss")),
        test_accuracy=column(lambda run: run.number("test_accuracy")),
        step_seconds=column(SeedRun.step_seconds),
        peak_memory=column(lambda run: run.number("peak_memory_bytes")),
        median_steps=_median(steps),
        median_epochs=_median(epochs),
        median_seconds=_median(seconds),
        **_robustness(plan, layout, name, tuned),
    )


def _robustness(plan: CompareConfig, layout: Layout, name: str, tuned: Tuned | None) -> dict[str, Any]:
    """How the end depends on the learning rate and on the start, as far as it was tried."""
    if tuned is None or plan.robustness is None:
        return {}
    best, upwards = tuned.best, plan.target.larger_is_better

    def final(path: Path) -> float:
        run = SeedRun.read(path, plan.target)
        return math.nan if run is None else run.final_value()

    rates = tuple(final(path) for path in layout.rate_runs(name))
    scales = tuple(final(path) for row in layout.scale_runs(name) for path in row)
    return {
        "rates": layout.rates(best),
        "rate_values": rates,
        "rate_share": _share(rates, upwards),
        "scales": plan.robustness.scales,
        "scale_values": scales,
        "scale_share": _share(scales, upwards),
    }


def _share(values: Sequence[float], upwards: bool) -> float:
    """The share near the best; NaN until all runs are there."""
    return math.nan if np.isnan(values).any() else statistics.share_near_best(values, larger_is_better=upwards)


def _median(times: Sequence[float]) -> statistics.Estimate:
    """Over the runs that are there; unknown without any."""
    known = np.array([time for time in times if not math.isnan(time)])
    return statistics.median_estimate(known) if len(known) > 1 else UNKNOWN


def pairings(contenders: Sequence[Contender], baseline: str) -> list[Pairing]:
    """Each two optimizers, the baseline always second; the p-values corrected over all of them.

    Steps and time are two questions, each with a correction of its own.
    """
    couples = [
        (second, first) if first.name == baseline else (first, second)
        for first, second in itertools.combinations(contenders, 2)
    ]
    pairs = [_pair(first, second) for first, second in couples]
    of_steps, of_seconds = (statistics.holm([getattr(pair, key) for pair in pairs]) for key in ("p", "seconds_p"))
    return [
        dataclasses.replace(
            pair,
            p_corrected=steps,
            seconds_p_corrected=seconds,
            smallest_p=min(1.0, len(pairs) * pair.smallest_p),
        )
        for pair, steps, seconds in zip(pairs, of_steps, of_seconds, strict=True)
    ]


def _pair(first: Contender, second: Contender) -> Pairing:
    """Over the seeds that both have; a pair with fewer than two says nothing."""
    both = [i for i, steps in enumerate(zip(first.steps, second.steps, strict=True)) if not np.isnan(steps).any()]

    def columns(key: str) -> tuple[np.ndarray, np.ndarray]:
        return np.array(getattr(first, key))[both], np.array(getattr(second, key))[both]

    enough = len(both) > 1
    timed = enough and not np.isnan(np.concatenate(columns("seconds"))).any()
    return Pairing(
        first=first.name,
        second=second.name,
        n=len(both),
        steps_ratio=statistics.ratio_estimate(*columns("steps")) if enough else UNKNOWN,
        seconds_ratio=statistics.ratio_estimate(*columns("seconds")) if timed else UNKNOWN,
        difference=statistics.difference_estimate(*columns("final")) if enough else UNKNOWN,
        p=statistics.paired_test(*columns("steps")) if enough else 1.0,
        p_corrected=1.0,
        smallest_p=statistics.smallest_p(max(len(both), 1)),
        seconds_p=statistics.paired_test(*columns("seconds")) if timed else 1.0,
    )


def _machine(layout: Layout, plan: CompareConfig) -> str:
    """What the first run's times were measured on, in words."""
    for name, seed in itertools.product(plan.names, plan.seeds):
        path = layout.seed_run(name, seed)
        if (path / "environment.json").is_file():
            known = RunFolder(path).environment
            return (
                f"{known.get('processor')}, {known.get('cpu_count')} cores, {known.get('threads')} thread(s) a run, "
                f"{known.get('device')}, torch {known.get('torch')}"
            )
    return ""
