"""Straight lines between solutions, before and after the units of the second are put in order."""

import numpy as np

from losslab.report.chart import Chart, Line, Panel, colour, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Pair

_KINDS = (("before", "as trained"), ("after", "units matched"), ("repaired", "matched and repaired"))


def alignment(contents: Contents, colours: Colours) -> list[Chart]:
    """One panel a pair: the loss from the first solution to the second, and to the permuted second."""
    panels = [panel for pair in contents.pairs if (panel := _panel(pair, len(colours))) is not None]
    if not panels:
        return []
    caption = (
        "The loss from the first solution (α = 0) to the second (α = 1), dashed as it is, solid once the units of the "
        "second stand in the order that fits the first: a hill that vanishes was only a matter of the order."
    )
    return [Chart("alignment", "Barriers before and after matching units", caption, panels)]


def _panel(pair: Pair, first_colour: int) -> Panel | None:
    alphas, series = pair.array("alignment.alphas"), []
    for index, (kind, words) in enumerate(_KINDS):
        losses = pair.array(f"alignment.losses_{kind}")
        if losses.size and np.isfinite(losses).any():
            barrier = pair.get(f"alignment.barrier_{kind}")
            name = words if barrier is None else f"{words}: barrier {barrier:.3g}"
            series.append(Line(name, alphas, losses, colour(first_colour + index), dashed=kind == "before"))
    if not series:
        return None
    log_y = spans_decades(np.concatenate([line.y for line in series]))
    return Panel("α from the first solution to the second", "loss", series, title=pair.name, log_y=log_y)
