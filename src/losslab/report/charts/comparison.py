"""The pictures of a comparison of optimizers."""

import math
from collections.abc import Sequence

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, colour, spans_decades
from losslab.report.comparison import Compared, Rows
from losslab.studies.compare.result import Comparison, Contender
from losslab.studies.compare.statistics import Estimate, profile

GREY = "#8C8C8C"
FACTORS = np.linspace(1.0, 4.0, 301)  # AlgoPerf's range


def charts(compared: Compared) -> list[Chart]:
    """All pictures that the record allows, in the page's order."""
    comparison = compared.comparison
    drawn = (
        _curves(compared),
        _times(comparison),
        _profiles(comparison),
        _rates(comparison),
        _scales(comparison),
    )
    return [chart for chart in drawn if chart is not None]


def _curves(compared: Compared) -> Chart | None:
    """Validation loss, and the target's metric, against steps and time."""
    comparison = compared.comparison
    panels = []
    for metric in dict.fromkeys(("validation_loss", comparison.metric)):
        for label in ("steps", "seconds of training"):
            series = [
                _curve(compared.curves[each.name], each, index, metric, in_time=label != "steps")
                for index, each in enumerate(comparison.contenders)
                if any(compared.curves.get(each.name, ()))
            ]
            if series:
                panels.append(_curve_panel(comparison, metric, label, series))
    caption = (
        "Mean over the seeds, with a band of one standard deviation to each side; on the right each optimizer's steps "
        "are as wide as its mean step takes, and the dashed line is the target."
    )
    return Chart("curves", "How the runs went", caption, panels) if panels else None


def _curve(runs: Sequence[Rows], contender: Contender, index: int, metric: str, *, in_time: bool) -> Line:
    steps = np.array(sorted({row["step"] for rows in runs for row in rows}), dtype=float)
    table = np.full((len(runs), len(steps)), np.nan)
    for row_index, rows in enumerate(runs):
        for row in rows:
            value = row.get(metric)
            table[row_index, np.searchsorted(steps, row["step"])] = math.nan if value is None else value
    table[~np.isfinite(table)] = np.nan
    known = np.isfinite(table).any(axis=0)
    table, steps = _scale(metric) * table[:, known], steps[known]
    width = float(np.nanmedian(contender.step_seconds)) if in_time else 1.0
    mean, deviation = np.nanmean(table, axis=0), np.nanstd(table, axis=0)
    return Line(contender.name, steps * width, mean, colour(index), error=deviation)


def _curve_panel(comparison: Comparison, metric: str, label: str, series: list[Line]) -> Panel:
    log = metric.endswith("loss") and spans_decades(np.concatenate([line.y for line in series]))
    drawn: list[Series] = list(series)
    if metric == comparison.metric and math.isfinite(comparison.target):
        ends = np.array([0.0, max(line.x[-1] for line in series)])
        level = np.full(2, _scale(metric) * comparison.target)
        drawn.append(Line("target", ends, level, GREY, dashed=True))
    return Panel(label, _label(metric), drawn, log_y=log)


def _times(comparison: Comparison) -> Chart | None:
    """Steps and time to the target: every run, the median, the interval."""
    if not any(contender.reached for contender in comparison.contenders):
        return None
    panels = []
    for label, key in (("steps to the target", "steps"), ("seconds to the target", "seconds")):
        series: list[Series] = []
        for index, contender in enumerate(comparison.contenders):
            widest = comparison.horizon * (float(np.nanmedian(contender.step_seconds)) if key == "seconds" else 1.0)
            times = [time for time in getattr(contender, key) if math.isfinite(time)]
            series += _interval(contender, times, getattr(contender, f"median_{key}"), widest, colour(index))
        panels.append(Panel("", label, series))
    caption = (
        "Grey points are single runs, coloured ones medians with their 95 % interval; runs that missed the target "
        "count in both but have no point, and an interval that ends where the runs end is open above."
    )
    return Chart("times", "Until the target", caption, panels)


def _interval(
    contender: Contender, times: Sequence[float], median: Estimate, widest: float, shade: str
) -> list[Series]:
    place = f"{contender.name} ({contender.reached}/{contender.runs})"
    found: list[Series] = []
    if math.isfinite(median.low):
        ends = np.array([median.low, min(median.high, widest)])
        found.append(Line(contender.name, np.array([place] * 2), ends, shade, legend=False))
    found.append(Points("runs", np.array([place] * len(times)), np.array(times), GREY, legend=False))
    if math.isfinite(median.value):
        found.append(Points(contender.name, np.array([place]), np.array([median.value]), shade))
    return found


def _profiles(comparison: Comparison) -> Chart | None:
    """Performance profiles over the seeds that all have."""
    panels = []
    for label, key in (("steps", "steps"), ("time", "seconds")):
        table = np.array([getattr(contender, key) for contender in comparison.contenders])
        table = table[:, ~np.isnan(table).any(axis=0)] if table.size else table
        if not np.isfinite(table).any():
            continue
        shares = profile({each.name: row for each, row in zip(comparison.contenders, table, strict=True)}, FACTORS)
        series = [Line(name, FACTORS, share, colour(index)) for index, (name, share) in enumerate(shares.items())]
        panels.append(Panel(f"factor of the best in {label}", "share of the seeds", series, y_range=(0.0, 1.05)))
    caption = (
        "For how many seeds is an optimizer within this factor of the fastest one; a curve that starts high is often "
        "the fastest, one that ends below 1 misses the target or is more than four times as slow for the rest."
    )
    return Chart("profiles", "Performance profiles", caption, panels) if panels else None


def _rates(comparison: Comparison) -> Chart | None:
    """How the end depends on the learning rate."""
    series: list[Series] = []
    tuned = []
    for index, contender in enumerate(comparison.contenders):
        values = _finite(contender.rate_values, comparison.metric)
        if np.isfinite(values).any():
            rates = np.log10(np.array(contender.rates))
            series.append(Points(contender.name, rates, values, colour(index), joined=True))
            tuned.append(float(rates.mean()))
    panel = Panel("log₁₀ of the learning rate", f"{_label(comparison.metric)} at the end", series, guides=tuned)
    caption = (
        "A run each with other learning rates, three decades around the tuned one (dotted): a broad top means an "
        "optimizer that is easy to tune; a rate at which training diverged and left no finite value has no point."
    )
    return Chart("learning-rates", "Sensitivity to the learning rate", caption, [panel]) if series else None


def _scales(comparison: Comparison) -> Chart | None:
    """How the end depends on the first weights."""
    series: list[Series] = []
    for index, contender in enumerate(comparison.contenders):
        values = _finite(contender.scale_values, comparison.metric)
        if np.isfinite(values).any():
            starts = len(values) // len(contender.scales)
            shift = 0.12 * (index - (len(comparison.contenders) - 1) / 2)
            places = np.repeat(np.log2(np.array(contender.scales)), starts) + shift
            series.append(Points(contender.name, places, values, colour(index)))
    panel = Panel("log₂ of the scale of the first weights", f"{_label(comparison.metric)} at the end", series)
    caption = (
        "Each point is a run from other first weights, multiplied by the scale; points close together mean that the "
        "start matters little."
    )
    return Chart("initialisations", "Sensitivity to the start", caption, [panel]) if series else None


def _finite(values: Sequence[float], metric: str) -> np.ndarray:
    table = _scale(metric) * np.array(values, dtype=float)
    return np.where(np.isfinite(table), table, np.nan)


def _scale(metric: str) -> float:
    return 100.0 if metric.endswith("accuracy") else 1.0


def _label(metric: str) -> str:
    return metric.replace("_", " ") + (" (%)" if metric.endswith("accuracy") else "")
