"""The table of a comparison: a line a quantity, a column an optimizer.

One entry of `LINES` is a line of the table, on the page and on the terminal, and an entry of the glossary at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from losslab.report.table import ABSENT, Cell, number, percent
from losslab.studies.compare.result import Comparison, Contender, Pairing
from losslab.studies.compare.statistics import Estimate
from losslab.studies.compare.verdict import target_in_words

MEGA = 1e6
COARSE = 0.01  # of an accuracy's standard error: differences between optimizers are about as large


@dataclass(frozen=True)
class Line:
    """A line and its entry of the glossary: formula in plain text, what large and small mean, one caveat."""

    title: str
    formula: str
    meaning: str
    caveat: str
    cell: Callable[[Comparison, Contender], Cell]


def goal(comparison: Comparison) -> str:
    """What was to be reached, in words."""
    if math.isnan(comparison.target):
        return "a target that is not known yet"
    words = target_in_words(comparison.metric, comparison.target)
    return f"{words} (the median of {comparison.baseline} at the end)" if comparison.automatic else words


def remarks(comparison: Comparison) -> list[str]:
    """What weakens the numbers, a sentence each."""
    found = [f"{each.name}: {warning}." for each in comparison.contenders for warning in each.warnings]
    tried = {each.name: each.trials for each in comparison.contenders}
    if set(tried.values()) != {comparison.trials}:
        counts = ", ".join(f"{name} {count}" for name, count in tried.items())
        found.append(f"Not all have had their {comparison.trials} trials of tuning yet: {counts}.")
    least = min((pair.smallest_p for pair in comparison.pairs if pair.n > 1), default=0.0)
    if least > 0.05:
        over = f", corrected over {len(comparison.pairs)} pairs," if len(comparison.pairs) > 1 else ""
        found.append(
            f"With {len(comparison.seeds)} seeds no p{over} below {least:.2g} is possible: the test can at most say "
            "that all seeds agree."
        )
    found += [sentence] if (sentence := _grain(comparison)) else []
    found += [f"Failed: {failure}." for failure in comparison.failures]
    if not comparison.status.ok:
        found.append("The comparison was stopped: these are the numbers known by then; start it again and it goes on.")
    return found


def _grain(comparison: Comparison) -> str:
    """Whether the validation split is too small for the target; an empty sentence where it is not."""
    target, examples = comparison.target, comparison.validation_examples
    if not comparison.metric.endswith("accuracy") or not examples or math.isnan(target):
        return ""
    if target == 1:
        return (
            "The target is 100 %, the most there is: what is better than that cannot be told, and each of the "
            f"{examples} validation examples decides on when it is reached. Take validation_loss, or a target below."
        )
    error = math.sqrt(target * (1 - target) / examples)
    if error < COARSE:
        return ""
    return (
        f"The target rests on {examples} validation examples: one of them is {100 / examples:.2g} pp, and on as many "
        f"others the same network would be off by {100 * error:.2g} pp (standard error)."
    )


def pair_cells(comparison: Comparison, pair: Pairing) -> list[Cell]:
    """Ratios, difference, p and number of seeds of one pair."""
    unit, scale = (" pp", 100.0) if comparison.metric.endswith("accuracy") else ("", 1.0)
    difference = pair.difference
    known = not math.isnan(difference.value)
    ends = f"{number(scale * difference.low, 3)} to {number(scale * difference.high, 3)}" if known else ""
    return [
        _ratio(pair.steps_ratio, holds=pair.significant),
        _ratio(pair.seconds_ratio, holds=pair.significant_in_time),
        Cell(f"{number(scale * difference.value, 3)}{unit}", ends) if known else Cell(ABSENT),
        Cell(number(pair.p, 3)),
        Cell(number(pair.p_corrected, 3), f"{number(pair.smallest_p, 2)} at best"),
        Cell(str(pair.n)),
    ]


def _estimate(estimate: Estimate, unit: str = "", scale: float = 1.0) -> Cell:
    """A median with its interval below it."""
    if math.isnan(estimate.value):
        return Cell(ABSENT)
    low, high = (number(scale * end, 3) for end in (estimate.low, estimate.high))
    text = "not reached" if math.isinf(estimate.value) else f"{number(scale * estimate.value, 3)}{unit}"
    return Cell(text, f"{low} to {high}")


def _ratio(estimate: Estimate | None, *, holds: bool) -> Cell:
    if estimate is None:
        return Cell("1")
    if math.isnan(estimate.value):
        return Cell(ABSENT)
    low, high = (number(end, 3) for end in (estimate.low, estimate.high))
    reason = "" if holds else "the interval holds 1, or the test says less than it could"
    return Cell(f"{number(estimate.value, 3)}×", f"{low} to {high}", reason=reason)


def _steps_ratio(comparison: Comparison, contender: Contender) -> Cell:
    pair = comparison.against_baseline(contender.name)
    return _ratio(pair.steps_ratio if pair else None, holds=bool(pair and pair.significant))


def _seconds_ratio(comparison: Comparison, contender: Contender) -> Cell:
    pair = comparison.against_baseline(contender.name)
    return _ratio(pair.seconds_ratio if pair else None, holds=bool(pair and pair.significant_in_time))


def _p(comparison: Comparison, contender: Contender) -> Cell:
    pair = comparison.against_baseline(contender.name)
    if pair is None or pair.n < 2:
        return Cell(ABSENT)
    return Cell(number(pair.p_corrected, 3), f"{number(pair.p, 3)} alone")


def _reached(comparison: Comparison, contender: Contender) -> Cell:
    return Cell(f"{contender.reached} of {contender.runs}") if contender.runs else Cell(ABSENT)


def _metric(comparison: Comparison, values: tuple[float, ...]) -> Cell:
    known = np.array([value for value in values if not math.isnan(value)])
    if not known.size:
        return Cell(ABSENT)
    write = percent if comparison.metric.endswith("accuracy") else number
    return Cell(write(float(np.median(known))), f"{write(float(known.min()))} to {write(float(known.max()))}")


def _test_accuracy(comparison: Comparison, contender: Contender) -> Cell:
    known = np.array([value for value in contender.test_accuracy if not math.isnan(value)])
    if not known.size:
        return Cell(ABSENT)
    return Cell(percent(float(np.median(known))), f"{percent(float(known.min()))} to {percent(float(known.max()))}")


def _share(share: float) -> Cell:
    return Cell(ABSENT if math.isnan(share) else f"{100 * share:.0f} %")


def _typical(values: tuple[float, ...], scale: float, unit: str) -> Cell:
    known = [value for value in values if not math.isnan(value)]
    return Cell(f"{number(scale * float(np.median(known)), 3)} {unit}") if known else Cell(ABSENT)


def _tuned(comparison: Comparison, contender: Contender) -> Cell:
    if not contender.tuned:
        return Cell(ABSENT)
    text = ", ".join(f"{key.rpartition('.')[2]} {_plain(value)}" for key, value in contender.tuned.items())
    return Cell(text, reason=" ".join(contender.warnings))


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return "/".join(_plain(item) for item in value)
    return number(value, 3) if isinstance(value, float) else str(value)


LINES = (
    Line(
        "steps to target",
        "median over the seeds of the first evaluation that reaches the target; 95 % bootstrap interval",
        "Small means that it learns much from each batch.",
        "A run that never arrived counts as slowest; with five seeds the interval is the whole range.",
        lambda comparison, contender: _estimate(contender.median_steps),
    ),
    Line(
        "epochs to target",
        "the same in passes over the training split",
        "How often it has to see the data.",
        "No finer than the evaluations are: training.eval_every.",
        lambda comparison, contender: _estimate(contender.median_epochs),
    ),
    Line(
        "time to target",
        "the same in time of training, each run's own",
        "What is waited for, without evaluation and start, with all that is done only now and then.",
        "True of this machine and its load only.",
        lambda comparison, contender: _estimate(contender.median_seconds, " s"),
    ),
    Line(
        "reached",
        "runs that reached the target, of those that were made",
        "What the medians rest on.",
        "A diverged run has not reached it, whatever it had reached before.",
        _reached,
    ),
    Line(
        "steps, ratio",
        "median steps over those of the baseline; 95 % bootstrap interval over pairs of one seed",
        "0.5 is twice as fast. With a question mark it is no result: the difference may be chance.",
        "A factor on this problem at this horizon, not a property of the optimizer.",
        _steps_ratio,
    ),
    Line(
        "time, ratio",
        "median time over that of the baseline; 95 % bootstrap interval over pairs of one seed",
        "What is left of the factor when dearer steps are paid for.",
        "As the time to target.",
        _seconds_ratio,
    ),
    Line(
        "p",
        "signed-rank permutation test on the pairs' steps against the baseline, corrected over all pairs by Holm",
        "Small means that equal optimizers would seldom differ so much.",
        "n seeds allow no p below 2/2ⁿ before correction: 0.06 for n = 5.",
        _p,
    ),
    Line(
        "at the end",
        "median of the metric at the last evaluation; the range over the seeds",
        "What tuning looked at.",
        "On the validation split, which tuning has used: the test split has not been seen by anybody.",
        lambda comparison, contender: _metric(comparison, contender.final),
    ),
    Line(
        "best on the way",
        "median of the best evaluation of each run; the range over the seeds",
        "Much better than at the end: it overfits, or falls back.",
        "The best of many noisy numbers is too good.",
        lambda comparison, contender: _metric(comparison, contender.best),
    ),
    Line(
        "test accuracy",
        "median over the seeds at the end, on data never used before; the range",
        "Large is good.",
        "On N test examples its standard error is about √(accuracy · (1 − accuracy) / N).",
        _test_accuracy,
    ),
    Line(
        "learning rates",
        "share of the learning rates over three decades around the tuned one that end within 5 % of the best",
        "Large means that it is easy to tune.",
        "One seed each.",
        lambda comparison, contender: _share(contender.rate_share),
    ),
    Line(
        "initialisations",
        "share of the runs from several first weights, at several scales, that end within 5 % of the best",
        "Large means that the start matters little.",
        "A seed is also the order of the examples.",
        lambda comparison, contender: _share(contender.scale_share),
    ),
    Line(
        "step time",
        "mean time of a step in each run; the median over the runs",
        "What a step costs.",
        "True of this machine and its load only.",
        lambda comparison, contender: _typical(contender.step_seconds, 1e3, "ms"),
    ),
    Line(
        "memory",
        "peak memory of a run",
        "What has to be there.",
        "On a CPU that of the whole process, with the libraries.",
        lambda comparison, contender: _typical(contender.peak_memory, 1 / MEGA, "MB"),
    ),
    Line(
        "tuned",
        "the values that tuning chose",
        "A question mark: one of them lies at an end of its range, and the best may lie beyond it.",
        "The best of a few trials with one seed.",
        _tuned,
    ),
)
