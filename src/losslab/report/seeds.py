"""Runs that differ in their seed alone, as one: what an entry of a batch with `seeds` came to."""

from collections.abc import Iterable, Sequence

import numpy as np

from losslab.report.contents import Run
from losslab.report.table import ABSENT, percent, with_error
from losslab.studies.batch_file import together

HEAD = ("run", "seeds", "test accuracy", "worst", "test loss")


def rows(runs: Iterable[Run]) -> list[list[str]]:
    """A row for each, under `HEAD`: how many seeds came to an end, mean ± standard deviation over them."""
    table = []
    for name, group in together(runs).items():
        accuracies = finals(group, "test_accuracy")
        worst = percent(min(accuracies)) if accuracies else ABSENT
        table.append([name, _seeds(group), mean_accuracy(accuracies), worst, mean(finals(group, "test_loss"))])
    return table


def mean_accuracy(shares: Sequence[float]) -> str:
    """Mean ± standard deviation, in per cent."""
    if len(shares) < 2:
        return percent(shares[0] if shares else None)
    return f"{100 * np.mean(shares):.2f} ± {percent(np.std(shares, ddof=1))}"


def mean(values: Sequence[float]) -> str:
    """Mean ± standard deviation; without it where there is one value, or one that is not finite: a run diverged."""
    if not values:
        return ABSENT
    spread = len(values) > 1 and np.isfinite(values).all()
    return with_error(float(np.mean(values)), float(np.std(values, ddof=1)) if spread else None)


def finals(group: Iterable[Run], key: str) -> list[float]:
    """A value of the last row of each run that has one."""
    return [run.final[key] for run in group if run.final and run.final.get(key) is not None]


def _seeds(group: Sequence[Run]) -> str:
    ended = [run.final for run in group if run.final is not None]
    diverged = sum(final.get("status") == "diverged" for final in ended)
    text = str(len(group)) if len(ended) == len(group) else f"{len(ended)} of {len(group)}"
    return f"{text}, {diverged} diverged" if diverged else text
