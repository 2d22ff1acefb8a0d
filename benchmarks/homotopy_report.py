"""The learning-rate study in tables: goals first, then what they rest on, and what is missing."""

import csv
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from homotopy_figure import draw, rises
from homotopy_goals import goal_lines, goals_of
from homotopy_methods import DEFAULT, EXAMPLES, FRACTION, FREQUENCY, LAYERS, METHODS, RULES, estimates
from homotopy_study import COUNTS, EARLY, FREQUENCIES, STARTS, Study, mean_estimate, ratio_estimate, width
from homotopy_tasks import TASKS
from homotopy_text import between, interval, percent, said
from homotopy_times import known, name_of
from optimizer_cache import Missing
from table import machine, markdown

from losslab.optim.homotopy.options import ADAPTIVE, LATE
from losslab.optim.homotopy.rules import COOLDOWN

Value = TypeVar("Value")
LOST = 0.98  # of the loss of who knows nothing: from here on a seed has learnt nothing
FORMS = (DEFAULT, LAYERS)  # of the rule, whose goals are looked at
PROTOCOL = f"""\
- methods: constant; cosine to zero; warm-up over 2, 5 or 10 % of the run, then cosine (three times as many trials as
  the others: the best of the three is taken); warm-up over 10 %, constant, over the last {COOLDOWN:.0%} down to zero
  in a straight line ("cooldown"); `HomotopyLR` with its rule "stable", which falls alike, and before that takes
  {FRACTION:g} of the stability limit at first, {ADAPTIVE:g} with AdamW, and {LATE:g} in the end; the same with a rate
  for each module's own parameters (`PerLayerHomotopyLR`, "joint"); the other one of the two at first; {FRACTION:g}
  all along; the rule before, with a cosine and all of the limit in the end; and without `total_steps`, so without
  decay; the founders' two rules, their target the 75th percentile of the κ met. An estimate is one product, of
  {EXAMPLES} examples of the batch, every {FREQUENCY} steps in the end
- trials: the same grid of η₀ for every method, and nothing else is tuned; the mean final validation loss over the
  tuning seeds decides. Fresh seeds for the best η₀ of each, in pairs; test splits were looked at for these only, and
  decided nothing
- intervals: 95 %; means by Student's t, ratios of paired losses by bootstrap (BCa) of their logarithms
- range of η₀: around the best one, as far as the loss is within 5 % of the smallest; between two η₀ of the grid by the
  logarithms of both; a run that diverged counts as one that knows nothing. "≥": an end is the grid's
- diverged: the loss was not finite"""


class Asked:
    """Answers, or lines of what is missing."""

    def __init__(self) -> None:
        self.missing: list[str] = []

    def __call__(self, question: Callable[[], Value]) -> Value | None:
        try:
            return question()
        except Missing as missing:
            if str(missing) not in self.missing:
                self.missing.append(str(missing))
            return None


def page(studies: Sequence[Study]) -> list[str]:
    """Everything that is in the cache."""
    ask, sections, goals = Asked(), [], []
    seen: Counter[str] = Counter()
    for study in studies:
        for horizon in study.horizons:
            sections += [f"## {study.setting.title}, {horizon} steps", ""]
            sections += ask(lambda s=study, h=horizon: grid_lines(s, h)) or []
            sections += ask(lambda s=study, h=horizon: final_lines(s, h, seen)) or []
        if TASKS[study.setting.task].classes:
            goals += [(rule, goals_of(rule, study, ask)) for rule in FORMS]
    sections += ask(lambda: founders_lines(studies)) or []
    sections += emerging_lines(studies, ask) + time_lines(studies)
    for study in studies:
        sections += cost_lines(study, ask)
    where = ", ".join(f"{count} on {name}" for name, count in seen.items()) or "none"
    head = ["# Does a learning rate that follows curvature need less tuning?", "", *machine(("losslab", "torch"))]
    head += [f"- final runs: {where}", *PROTOCOL.splitlines(), ""]
    for rule in FORMS:
        head += goal_lines([each for name, each in goals if name == rule and each])
    return [*head, *sections, *([f"Missing: {'; '.join(ask.missing)}.", ""] if ask.missing else [])]


# -- one task with one optimizer --------------------------------------------------------------------------


def grid_lines(study: Study, horizon: int) -> list[str]:
    """Mean losses over the tuning seeds, and the ranges of η₀."""
    names = study.methods(horizon)
    means = {name: study.grid(name, horizon).mean(0) for name in names}
    counts = {len(study.grid(name, horizon)) for name in names}
    overall = min(float(losses.min()) for losses in means.values())
    rows = []
    for name, losses in means.items():
        own = width(study.rates, losses, 1.05 * float(losses.min()), study.worst())
        all_of = width(study.rates, losses, 1.05 * overall, study.worst())
        rows.append([name, *(said(loss, ".3g") for loss in losses), between(own), between(all_of)])
    head = ["validation loss at η₀ =", *(f"{lr:.3g}" for lr in study.rates), "within 5 % of its best", "of the best"]
    left = ", ".join(name for name in METHODS if name not in names)
    said_of = f" Not done with the rule as it is: {left}." if left else ""
    return [f"Means over {between_counts(counts)} tuning seeds.{said_of}", "", *markdown(head, rows), ""]


def between_counts(counts: set[int]) -> str:
    """One number, or from the one to the other."""
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def final_lines(study: Study, horizon: int, seen: Counter[str]) -> list[str]:
    """Fresh seeds at each method's best η₀."""
    rival = study.rival(horizon)
    against = [record["loss"] for record in study.final(rival, horizon)]
    rows, accuracies = [], TASKS[study.setting.task].classes
    for name in study.contenders(horizon):
        records = study.final(name, horizon)
        seen.update(f"{record['device']} with torch {record['torch']}" for record in records)
        losses = [record["loss"] for record in records]
        ratio = "1" if name == rival else interval(ratio_estimate(losses, against), ".3f")
        lost = sum(not loss < LOST * study.worst() for loss in losses)
        row = [name, f"{study.best(name, horizon)[0]:.3g}", interval(mean_estimate(losses), ".4g"), ratio]
        row += [f"{lost} of {len(losses)}"] if accuracies else []
        for key in ("test_loss", "accuracy", "test_accuracy") if accuracies else ():
            scale, form = (1.0, ".4g") if "loss" in key else (100.0, ".1f")
            row.append(interval(mean_estimate([scale * record.get(key, math.nan) for record in records]), form))
        rows.append([*row, str(len(records[0]["history"]["step"])) if name in RULES else "0"])
    head = ["method", "η₀", "validation loss", f"× that of {rival}"]
    head += ["learnt nothing", "test loss", "accuracy, %", "test accuracy, %"] if accuracies else []
    seeds = len(study.final_seeds)
    return [f"{seeds} fresh seeds; the best tuned schedule: {rival}.", "", *markdown([*head, "estimates"], rows), ""]


# -- the founders' experiments ----------------------------------------------------------------------------


def founders_lines(studies: Sequence[Study]) -> list[str]:
    """Their two claims: how many steps the rules need to where a tuned constant rate ends."""
    rows = []
    for study in studies:
        if study.setting.task not in ("quadratic", "mlp"):
            continue
        horizon = study.horizons[0]
        constant = study.final("constant", horizon)
        for name in (name for name in study.contenders(horizon) if name in RULES):
            records = study.final(name, horizon)
            steps = [arrival(r["curve"], c["curve"][-1]) for r, c in zip(records, constant, strict=True)]
            losses = [[record["loss"] for record in some] for some in (records, constant)]
            median = float(np.median(steps))
            faster = f"{horizon / median:.2f}×" if math.isfinite(median) else "–"
            ratio = interval(ratio_estimate(*losses), ".3g")
            reached = f"{median:.0f}" if math.isfinite(median) else f"more than {horizon}"
            rows.append([f"{study.setting.task}: {name}", ratio, reached, faster])
    head = (
        "rule at its best η₀",
        "loss in that of the tuned constant rate",
        "median steps to where that ends",
        "faster",
    )
    if not rows:
        return []
    claims = "quadratic 0.124 → 0.089 (0.72), 1.28× faster; MLP 1.456 → 1.234 (0.85), both against a rate not tuned"
    return ["## The founders' two experiments", "", f"They report: {claims}.", "", *markdown(head, rows), ""]


def arrival(curve: Sequence[float], target: float) -> float:
    """Steps until a loss is no larger than the target; infinite where it never is."""
    return next((float(step) for step, loss in enumerate(curve) if loss <= target), math.inf)


# -- what emerges, and what it costs ----------------------------------------------------------------------


def emerging_lines(studies: Sequence[Study], ask: Asked) -> list[str]:
    """How the rate changes where curvature alone sets it."""
    rows = []
    for study in studies:
        if not study.emerges:
            continue
        for (seed, scale), record in zip(STARTS, ask(lambda s=study: s.runs(s.emerging_runs())) or (), strict=False):
            cells = rises(record["history"])
            start = f"seed {seed}, first weights × {scale:g}"
            rows.append([f"{study.setting.task}, {study.setting.optimizer}", start, *cells])
    if not rows:
        return []
    head = ("task", "start", "η, steps 50–100 in that of 1–5", "λ", "κ", "highest η at step", "warm-up emerges")
    lines = [
        "## Does a warm-up emerge?",
        "",
        f"The first {EARLY} steps, without a rise of its own: the second step is as",
    ]
    lines[-1] += " long as curvature allows. A warm-up is said to emerge where η grows by half or more."
    return [*lines, "", *markdown(head, rows), ""]


def time_lines(studies: Sequence[Study]) -> list[str]:
    """What an estimate costs, and what it adds to a step."""
    rows = []
    for study, device in ((study, device) for study in studies for device in ("cpu", "cuda")):
        for name, cost in (Asked()(lambda s=study, d=device: known(s, [d])) or {}).items():
            base, due, plain = (float(np.median(part)) for part in (cost.base, cost.due, cost.plain))
            horizon = study.horizons[0]
            shares = [percent(cost.overhead(horizon, FREQUENCY, steady=steady)) for steady in (False, True)]
            quiet = "yes" if cost.alone else "no"
            cells = [f"{base:.2f}", f"{(due - plain) / base:.2f}", *shares, quiet, cost.device]
            rows.append([f"{study.setting.title}: {name}", *cells])
    if not rows:
        return []
    head = (
        "estimates of",
        "step, ms",
        "an estimate, steps",
        f"added at every {FREQUENCY} steps: this run",
        "in the end",
    )
    return ["## What estimates cost", "", *markdown((*head, "alone", "device"), rows), ""]


def cost_lines(study: Study, ask: Asked) -> list[str]:
    """What an estimate of fewer examples, or less often, changes."""
    if (study.setting.task, study.setting.optimizer) != ("cifar10", "momentum"):
        return []
    horizon, rows, times = study.horizons[0], [], ask(lambda: known(study)) or {}
    for count in COUNTS:
        cells = []
        for frequency in FREQUENCIES:
            records = ask(lambda n=count, f=frequency: study.runs(study.cost_runs(n, f)))
            loss = interval(mean_estimate([r["loss"] for r in records]), ".3f") if records else "–"
            cost = times.get(name_of(count))
            added = (
                [percent(cost.overhead(horizon, frequency, steady=s)) for s in (False, True)] if cost else ["–", "–"]
            )
            cells.append(f"{loss}; {added[0]}, {added[1]}")
        rows.append([name_of(count), *cells])
    if all("–; –" in cell for row in rows for cell in row[1:]):
        return []
    counts = ", ".join(f"{estimates(horizon, f)} at {f}" for f in FREQUENCIES)
    text = f'Validation loss of "{DEFAULT}"; time added in {horizon} steps, and in the end. Estimates in it: {counts}.'
    head = ("estimates of", *(f"every {frequency} steps" for frequency in FREQUENCIES))
    return ["## How many examples, how often?", "", study.setting.title, "", text, "", *markdown(head, rows), ""]


# -- files ------------------------------------------------------------------------------------------------


def write_metrics(studies: Sequence[Study], path: Path) -> None:
    """Of the first final run on MNIST: what `export_metrics` writes but the trace, which costs products of its own.

    `losslab demo homotopy` has the constant rate's run beside it, as the founders' demonstration.
    """
    for study in studies:
        if (study.setting.task, study.setting.optimizer) != ("mnist", "momentum"):
            continue
        history = Asked()(lambda s=study: s.final(DEFAULT, s.horizons[0])[0]["history"])
        if history:
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([list(history), *zip(*history.values(), strict=True)])


def write_figure(studies: Sequence[Study], path: Path) -> None:
    """What emerges, drawn."""
    ask, found = Asked(), {}
    for study in studies:
        if study.emerges:
            records = ask(lambda s=study: s.runs(s.emerging_runs()))
            if records:
                found[study.setting.title] = [record["history"] for record in records]
    if found:
        draw(found, path)
