"""The goals of the learning-rate study: overhead, final loss, and how wide the range of good η₀ is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from homotopy_methods import COSINES, DEFAULT, EXAMPLES, FREQUENCY, SCHEDULES
from homotopy_study import NEAR, Study, Width, ratio_estimate, width
from homotopy_text import between, interval, percent
from homotopy_times import Cost, known, name_of
from table import markdown

from losslab.studies.compare.statistics import Estimate

OVERHEAD, LOSS, WIDER = 0.05, 1.02, 3.0


@dataclass(frozen=True)
class Goals:
    """What a form of the rule "stable" reaches on one task; None is not known yet.

    Attributes:
        rule: Which form.
        study: The task with its optimizer.
        cost: Of an estimate.
        ratios: The final loss in that of the best tuned one of a constant rate and the cosines; and of all schedules.
        rivals: Which these are.
        own: The ranges of η₀ of a constant rate, of the rival and of the rule, each within 5 % of its own best.
        overall: Likewise, within 5 % of the best of all methods.
    """

    rule: str
    study: Study
    cost: Cost | None
    ratios: list[Estimate | None]
    rivals: list[str]
    own: list[Width | None]
    overall: list[Width | None]


def goals_of(rule: str, study: Study, ask: Callable[[Callable[[], Any]], Any]) -> Goals | None:
    """From what is in the cache; None before there is a grid."""
    horizon = study.horizons[0]
    usual, rival = (ask(lambda n=names: study.rival(horizon, n)) for names in (["constant", *COSINES], list(SCHEDULES)))
    means = ask(lambda: {name: study.grid(name, horizon).mean(0) for name in study.methods(horizon)})
    if means is None or rival is None or rule not in means:
        return None
    best = min(float(losses.min()) for losses in means.values())

    def ranges(limit: Callable[[np.ndarray], float]) -> list[Width | None]:
        some = [means[name] for name in ("constant", rival, rule)]
        return [width(study.rates, losses, NEAR * limit(losses), study.worst()) for losses in some]

    own, overall = ranges(lambda losses: float(losses.min())), ranges(lambda _: best)

    def ratio(name: str) -> Estimate:
        return ratio_estimate(*([r["loss"] for r in study.final(each, horizon)] for each in (rule, name)))

    costs = ask(lambda: known(study)) or {}
    ratios = [ask(lambda n=name: ratio(n)) for name in (usual, rival)]
    cost = costs.get(name_of(EXAMPLES) if rule == DEFAULT else rule)
    return Goals(rule, study, cost, ratios, [usual, rival], own, overall)


def goal_lines(found: Sequence[Goals]) -> list[str]:
    """Four tables, with a row for each task, of one form of the rule."""
    if not found:
        return []
    rows = [[each.study.setting.title, *_overhead(each)] for each in found]
    lines = [
        f"## Goals: {found[0].rule}",
        "",
        *markdown(("task", "overhead: this run; in the end", "≤ 5 %?"), rows),
        "",
    ]
    rows = [[each.study.setting.title, *_loss(each, 0), *_loss(each, 1)] for each in found]
    head = ("task", "final loss in that of the best of constant, cosine, warm-up + cosine", "≤ 1.02?")
    lines += [*markdown((*head, "and of warm-up + cooldown", "≤ 1.02?"), rows), ""]
    for title, ranges in (("its own best", lambda goals: goals.own), ("the best of all", lambda goals: goals.overall)):
        rows = [[each.study.setting.title, *map(between, ranges(each)), wider(*ranges(each)[::2])] for each in found]
        head = (f"η₀ within 5 % of {title}", "constant", "best schedule", found[0].rule, "≥ 3× wider than constant's?")
        lines += [*markdown(head, rows), ""]
    return lines


def _overhead(goals: Goals) -> list[str]:
    if goals.cost is None:
        return ["–", "–"]
    shares = [goals.cost.overhead(goals.study.horizons[0], FREQUENCY, steady=steady) for steady in (False, True)]
    busy = "" if goals.cost.alone else " (not alone)"
    words = {(True, True): "met", (False, True): "not in this run, met in the end"}
    return ["; ".join(map(percent, shares)) + busy, words.get(tuple(s <= OVERHEAD for s in shares), "not met")]


def _loss(goals: Goals, which: int) -> list[str]:
    ratio = goals.ratios[which]
    if ratio is None:
        return ["–", "–"]
    if not math.isfinite(ratio.value):
        return ["diverged", "not met"]
    sure = ratio.high <= LOSS or ratio.low > LOSS
    verdict = ("met" if ratio.value <= LOSS else "not met") + ("" if sure else ", not surely")
    return [f"{interval(ratio, '.3f')} ({goals.rivals[which]})", verdict]


def wider(constant: Width | None, rule: Width | None) -> str:
    """Whether the rule's range is three times as wide, as far as the grid can tell."""
    if rule is None:
        return "not met"
    if constant is None:
        return "met: constant nowhere"
    factor, more = rule.ratio / constant.ratio, rule.open_low or rule.open_high
    unknown = constant.open_low or constant.open_high
    verdict = "met" if factor >= WIDER else "not known" if more else "not met"
    return f"{verdict}: {'≥ ' if more and not unknown else '≈ ' if unknown else ''}{factor:.2g}×"
