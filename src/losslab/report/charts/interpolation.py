"""Straight lines between solutions."""

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, colour, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Pair


def interpolation(contents: Contents, colours: Colours) -> list[Chart]:
    """The loss on the straight line through two solutions, with the two ends marked; the accuracy where it is known."""
    losses: list[Series] = []
    accuracies: list[Series] = []
    for index, pair in enumerate(contents.pairs):
        shade = colour(len(colours) + index)
        alphas, values = pair.array("interpolation.alphas"), pair.array("interpolation.losses")
        if np.isfinite(values).any():
            barrier = pair.get("interpolation.barrier")
            name = pair.name if barrier is None else f"{pair.name}: barrier {barrier:.3g}"
            losses += [Line(name, alphas, values, shade), *_ends(pair, colours, shade)]
            shares = 100 * pair.array("interpolation.accuracies")
            if np.isfinite(shares).any():
                accuracies.append(Line(name, alphas, shares, shade, legend=False))
    if not losses:
        return []
    label = "α along the line (0 and 1 are the two solutions)"
    log = spans_decades(np.concatenate([s.y for s in losses if isinstance(s, Line)]))
    panels = [Panel(label, "loss", losses, log_y=log, guides=(0.0, 1.0))]
    if accuracies:
        panels.append(Panel(label, "accuracy (%)", accuracies, guides=(0.0, 1.0)))
    caption = (
        "The loss from the first solution (α = 0) to the second (α = 1) and beyond: a hill between the "
        "markers is a barrier, a flat floor means one connected valley."
    )
    return [Chart("interpolation", "Straight lines between solutions", caption, panels)]


def _ends(pair: Pair, colours: Colours, otherwise: str) -> list[Points]:
    """A marker at each end that has a loss."""
    ends = [("loss_a", 0.0, pair.first), ("loss_b", 1.0, pair.second)]
    known = [(pair.array(f"interpolation.{key}"), alpha, run) for key, alpha, run in ends]
    return [
        Points(run, np.array([alpha]), np.atleast_1d(loss), colours.get(run, otherwise), legend=False)
        for loss, alpha, run in known
        if loss.size
    ]
