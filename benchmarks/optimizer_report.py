"""The optimizer study in tables: what was found, how sure it is, and what is missing."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from optimizer_cache import Missing
from optimizer_runs import Record
from optimizer_study import LOWEST, RIVALS, Study, Tuned, claim, scaled, space_of
from optimizer_times import Times, known
from table import markdown

from losslab.studies.compare.statistics import Estimate, median_estimate, ratio_estimate

Value = TypeVar("Value")
HEAD = ("optimizer", "loss at T", "test accuracy", "steps to target", "missed", "step ms", "of it optimizer")
HEAD += ("seconds to target", "state", "trials", "next best", "settings")
PAIR = ("TALT against", "steps", "", "time", "", "step time")
SUMMARY = (
    "task",
    "steps × SGD + momentum's",
    "× AdamW's",
    "× best rival's",
    "time × AdamW's",
    "step × AdamW's",
    "state",
)


@dataclass
class Contender:
    """What is known of one optimizer; None is not yet."""

    name: str
    tuned: Tuned | None = None
    finals: list[Record] | None = None
    arrivals: np.ndarray | None = None
    times: Times | None = None

    @property
    def steps(self) -> float:
        """Median steps to the target."""
        return math.inf if self.arrivals is None else float(np.median(self.arrivals))


@dataclass
class Findings:
    """One task's study, as far as it is done."""

    study: Study
    target: float = math.nan
    baseline: str = ""
    contenders: dict[str, Contender] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def ask(self, question: Callable[[], Value]) -> Value | None:
        """An answer, or None and a line of what is missing."""
        try:
            return question()
        except Missing as missing:
            if str(missing) not in self.missing:
                self.missing.append(str(missing))
            return None

    def pair(self, first: str, second: str) -> Estimate | None:
        """The ratio of median steps to the target."""
        one, other = (self.contenders.get(name, Contender(name)).arrivals for name in (first, second))
        return None if one is None or other is None else ratio_estimate(one, other)

    def best_rival(self) -> str | None:
        """The one that needs the fewest steps, of all that were tuned but TALT; only when all of these are known."""
        rivals = [each for name, each in self.contenders.items() if name in RIVALS and each.tuned]
        if not rivals or any(each.arrivals is None for each in rivals):
            return None
        return min(rivals, key=lambda each: each.steps).name

    def step_ratio(self, other: str) -> float | None:
        """TALT's step time in the other's."""
        first, second = (self.contenders.get(name, Contender(name)).times for name in ("talt", other))
        return first.step / second.step if first and second else None


def findings(study: Study, optimizers: Sequence[str]) -> Findings:
    """Everything that is in the cache."""
    found = Findings(study)
    found.target, found.baseline = found.ask(study.target) or (math.nan, "")
    for name in optimizers:
        each = found.contenders[name] = Contender(name, found.ask(lambda name=name: study.tuned(name)))
        if each.tuned is None:
            continue
        each.finals = found.ask(lambda name=name: study.final(name))
        if not math.isnan(found.target):
            each.arrivals = found.ask(lambda name=name: study.arrivals(name, found.target))
            each.times = found.ask(lambda name=name: known(study, name, found.target))
    return found


# -- one task ---------------------------------------------------------------------------------------------


def task_lines(found: Findings) -> list[str]:
    """A task's section."""
    study, task = found.study, found.study.task
    horizon, seeds = study.protocol.horizon(task), len(study.protocol.final_seeds(task))
    lines = [f"## {task.title}", "", f"T = {horizon} steps of {task.batch_size} examples; n = {seeds} final seeds."]
    if found.baseline:
        lines[-1] += f" Target: a validation loss of {found.target:.4g}, {found.baseline}'s median at T."
    lines += ["", *markdown(HEAD, map(_row(found), found.contenders.values())), ""]
    pairs = [_pair_row(found, name) for name in found.contenders if name != "talt"]
    if "talt" in found.contenders:
        lines += [*markdown(PAIR, pairs), "", *_at_the_best_rivals_target(found)]
    if busy := [each.name for each in found.contenders.values() if each.times and not each.times.alone]:
        lines += [f"The machine did other things while these were timed: {', '.join(busy)}.", ""]
    if found.missing:
        lines += ["Missing: " + "; ".join(found.missing) + ".", ""]
    return lines


def _row(found: Findings) -> Callable[[Contender], list[str]]:
    def row(each: Contender) -> list[str]:
        if each.tuned is None or each.finals is None:
            return [each.name, *["–"] * (len(HEAD) - 1)]
        losses = median_estimate([record["loss"] for record in each.finals])
        first, steps = each.finals[0], "–"
        if each.arrivals is not None:
            lowest = found.study.protocol.horizon(found.study.task, LOWEST)
            steps = ("≤ " if each.steps <= lowest else "") + _estimate(median_estimate(each.arrivals), ".0f")
        return [
            each.name,
            _estimate(losses, ".4g"),
            _percent([record["test_accuracy"] for record in each.finals if "test_accuracy" in record]),
            steps,
            "–" if each.arrivals is None else f"{int(np.isinf(each.arrivals).sum())}/{len(each.arrivals)}",
            f"{each.times.step:.1f}" if each.times else "–",
            _over_rounds(each.times.optimizer) if each.times else "–",
            _short(each.steps * each.times.step / 1e3, ".2f") if each.times else "–",
            f"{first['state_numbers'] / first['parameters']:.1f}",
            str(len(each.tuned.trials)),
            f"{100 * (each.tuned.next_best / each.tuned.loss - 1):+.1f} %" if each.tuned else "",
            _settings(each),
        ]

    return row


def _pair_row(found: Findings, name: str) -> list[str]:
    """TALT against one rival: ratios, and what may be claimed."""
    best = found.best_rival()
    steps, slower = found.pair("talt", name), found.step_ratio(name)
    said = [f"{name} (best rival)" if name == best else name]
    for estimate in (steps, scaled(steps, slower) if steps and slower else None):
        said += [_estimate(estimate, ".2f"), claim(estimate)] if estimate else ["–", "–"]
    return [*said, f"{slower:.2f}" if slower else "–"]


def _at_the_best_rivals_target(found: Findings) -> list[str]:
    """The same against the best of all rivals where that one's median at T is the target."""
    study = found.study
    try:
        target, name = study.target(RIVALS)
        estimate = ratio_estimate(study.arrivals("talt", target), study.arrivals(name, target))
    except Missing:
        return []
    where = f"At the target of the best of all rivals ({name}'s median at T, {target:.4g})"
    return [f"{where}: {_estimate(estimate, '.2f')} of its steps, {claim(estimate)}.", ""]


def _settings(each: Contender) -> str:
    """The tuned settings, and how far the range of learning rates was extended."""
    assert each.tuned is not None
    said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in each.tuned.settings.items())
    declared = space_of(each.name)["lr"]
    extended = (each.tuned.low, each.tuned.high) != (declared.low, declared.high)  # type: ignore[union-attr]
    return said + (f"; lr searched from {each.tuned.low:g} to {each.tuned.high:g}" if extended else "")


def _percent(values: Sequence[float]) -> str:
    return "–" if not values or any(map(math.isnan, values)) else f"{100 * statistics.median(values):.1f} %"


def _over_rounds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def _short(value: float, form: str) -> str:
    return "∞" if math.isinf(value) else "?" if math.isnan(value) else format(value, form)


def _estimate(estimate: Estimate, form: str) -> str:
    low, value, high = (_short(number, form) for number in (estimate.low, estimate.value, estimate.high))
    return f"{value} [{low}, {high}]"


# -- all tasks --------------------------------------------------------------------------------------------


def summary_lines(all_found: Sequence[Findings]) -> list[str]:
    """One row a task, and the medians over the tasks for which a number is known."""
    rows: list[list[float | None]] = []
    for found in all_found:
        best, slower = found.best_rival(), found.step_ratio("adamw")
        ratios = [found.pair("talt", name) if name else None for name in ("momentum", "adamw", best)]
        values = [ratio.value if ratio else None for ratio in ratios]
        time = values[1] * slower if values[1] is not None and slower else None
        finals = found.contenders.get("talt", Contender("talt")).finals
        state = finals[0]["state_numbers"] / finals[0]["parameters"] if finals else None
        rows.append([*values, time, slower, state])
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    medians = [statistics.median(column) if column else None for column in columns]
    named = [(found.study.task.title, row) for found, row in zip(all_found, rows, strict=True)]
    cells = [[name, *(_short(v, ".2f") if v is not None else "–" for v in row)] for name, row in named]
    counts = f"median of {max(map(len, columns), default=0)} tasks"
    cells.append([counts, *(_short(v, ".2f") if v is not None else "–" for v in medians)])
    return ["## TALT over all tasks", "", *markdown(SUMMARY, cells), ""]
