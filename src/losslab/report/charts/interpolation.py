"""Straight lines between solutions."""


import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, colour, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents


def interpolation(contents: Contents, colours: Colours) -> list[Chart]:
    """The loss on the straight line through two solutions, with the two ends marked."""
    series: list[Series] = []
    for index, pair in enumerate(contents.pairs):
        alphas, losses = pair.array("interpolation.alphas"), pair.array("interpolation.losses")
        if np.isfinite(losses).any():
            barrier = pair.get("interpolation.barrier")
            name = pair.name if barrier is None else f"{pair.name}: barrier {barrier:.3g}"
            series.append(Line(name, alphas, losses, colour(len(colours) + index)))
            for end, alpha, run in (("loss_a", 0.0, pair.first), ("loss_b", 1.0, pair.second)):
                loss = pair.array(f"interpolation.{end}")
                if loss.size:
                    mark = np.array([alpha]), np.atleast_1d(loss)
                    series.append(Points(run, *mark, colours.get(run, colour(index)), legend=False))
    if not series:
        return []
    losses = np.concatenate([s.y for s in series if isinstance(s, Line)])
    label = "α along the line (0 and 1 are the two solutions)"
    panel = Panel(label, "loss", series, log_y=spans_decades(losses), guides=(0.0, 1.0))
    caption = (
        "The loss from the first solution (α = 0) to the second (α = 1) and beyond: a hill between the "
        "markers is a barrier, a flat floor means one connected valley."
    )
    return [Chart("interpolation", "Straight lines between solutions", caption, [panel])]
