"""Gradient descent from the solution: what the curvature predicts, and what was seen."""

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Run


def convergence(contents: Contents, colours: Colours) -> list[Chart]:
    """The loss seen and predicted at each step, and the excess over the quadratic model's minimum by its two rates."""
    losses: list[Series] = []
    excess: list[Series] = []
    for run in contents.runs:
        seen, predicted = run.array("convergence.losses"), run.array("convergence.predicted")
        if not np.isfinite(seen).any() or not np.isfinite(predicted).all():
            continue
        steps, colour = np.arange(len(seen)), colours[run.name]
        rate = run.get("convergence.learning_rate")
        losses.append(Line(run.name if rate is None else f"{run.name} (η = {rate:.3g})", steps, seen, colour))
        losses.append(Line(f"{run.name}, predicted", steps, predicted, colour, dashed=True, legend=False))
        if (parted := run.get("convergence.departs_at")) is not None:
            mark = np.array([parted]), seen[parted : parted + 1]
            losses.append(Points(f"{run.name}, parted", *mark, colour, legend=False))
        excess += _excess(run, predicted, colour)
    if not losses:
        return []
    log = spans_decades(np.concatenate([series.y for series in losses]))
    panels = [Panel("step of gradient descent", "loss", losses, log_y=log, title="seen, and predicted (dashed)")]
    if excess:
        title = "predicted, and by the rate alone (dashed)"
        panels.append(Panel("step of gradient descent", "share of the excess loss left", excess, title, log_y=True))
    caption = (
        "Left: as long as the dashed line lies on the solid one the quadratic model describes training, and a marker "
        "shows where they part; right: how much of the quadratic model's way down is left, with all its curvatures "
        "and, dashed, at the rate of its slowest direction alone."
    )
    return [Chart("convergence", "Gradient descent against its prediction", caption, panels)]


def _excess(run: Run, predicted: np.ndarray, colour: str) -> list[Series]:
    """What is left of the way from L₀ down to the quadratic model's minimum."""
    linear, minimum = run.array("convergence.linear"), run.get("convergence.minimum")
    if not np.isfinite(linear).all() or minimum is None or not minimum < predicted[0]:
        return []
    left, by_rate = ((curve - minimum) / (predicted[0] - minimum) for curve in (predicted, linear))
    steps = np.arange(len(predicted))
    return [
        Line(f"{run.name}, left", steps, np.where(left > 0, left, np.nan), colour, legend=False),
        Line(f"{run.name}, left by the rate", steps, by_rate, colour, dashed=True, legend=False),
    ]
