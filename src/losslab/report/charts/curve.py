"""Curves of low loss between solutions."""

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Series, colour, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Pair


def curve(contents: Contents, colours: Colours) -> list[Chart]:
    """Loss and accuracy on each pair's curve, solid, and on the straight line between the two, dashed."""
    losses: list[Series] = []
    accuracies: list[Series] = []
    for index, pair in enumerate(contents.pairs):
        shade = colour(len(colours) + index)
        losses += _both(pair, "losses", 1.0, shade)
        accuracies += _both(pair, "accuracies", 100.0, shade)
    if not losses:
        return []
    label = "t along the path (0 and 1 are the two solutions)"
    log = spans_decades(np.concatenate([series.y for series in losses]))
    panels = [Panel(label, "loss", losses, log_y=log)]
    if accuracies:
        panels.append(Panel(label, "accuracy (%)", accuracies))
    caption = (
        "Solid is the trained curve, dashed the straight line between the same two solutions: where the dashed line "
        "has a hill and the solid one has none, the two lie in one connected valley that is only bent."
    )
    return [Chart("curve", "Curves between solutions", caption, panels)]


def _both(pair: Pair, quantity: str, scale: float, shade: str) -> list[Series]:
    """The curve, named with its barrier and that of the line it replaces, and the line."""
    lines: list[Series] = []
    barriers = pair.get("curve.barrier"), pair.get("curve.line.barrier")
    name = pair.name if None in barriers else f"{pair.name}: barrier {barriers[0]:.3g}, straight {barriers[1]:.3g}"
    for ts, values, dashed in (("ts", quantity, False), ("line.alphas", f"line.{quantity}", True)):
        y = scale * pair.array(f"curve.{values}")
        if np.isfinite(y).any():
            label = f"{pair.name}, straight" if dashed else name
            legend = quantity == "losses" and not dashed
            lines.append(Line(label, pair.array(f"curve.{ts}"), y, shade, dashed=dashed, legend=legend))
    return lines
