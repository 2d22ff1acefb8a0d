"""Numbers as the learning-rate study prints them."""

import math
import statistics
from collections.abc import Sequence

from homotopy_study import Width

from losslab.studies.compare.statistics import Estimate


def said(value: float, form: str) -> str:
    """A number; infinite ones diverged."""
    return "diverged" if math.isinf(value) else "–" if math.isnan(value) else format(value, form)


def interval(estimate: Estimate, form: str) -> str:
    """A number with its interval, where there is one."""
    value = said(estimate.value, form)
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return value
    return f"{value} [{estimate.low:{form}}, {estimate.high:{form}}]"


def between(found: Width | None) -> str:
    """A range of η₀, and the ratio of its ends."""
    if found is None:
        return "nowhere"
    form = ",.0f" if found.ratio >= 100 else ".3g"
    ratio = f"{'≥ ' if found.open_low or found.open_high else ''}{found.ratio:{form}}×"
    low, high = ("≤ " if found.open_low else "") + f"{found.low:.2g}", ("≥ " if found.open_high else "")
    return f"{ratio} ({low} to {high}{found.high:.2g})"


def with_worst(losses: Sequence[float]) -> str:
    """Their mean, and the largest."""
    return f"{said(statistics.mean(losses), '.3f')} ({said(max(losses), '.3f')})"


def percent(share: float) -> str:
    """Of a share."""
    return f"{100 * share:.1f} %"
