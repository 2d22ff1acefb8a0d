"""Paths of least loss between solutions."""

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, colour, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Pair


def elastic_band(contents: Contents, colours: Colours) -> list[Chart]:
    """The loss along each band with its pivots, beside the straight line where that was measured."""
    along: list[Series] = []
    cycles: list[Series] = []
    for index, pair in enumerate(contents.pairs):
        losses = pair.array("elastic_band.losses")
        if not np.isfinite(losses).any():
            continue
        shade = colour(len(colours) + index)
        along += _path(pair, losses, shade) + _straight(pair, shade)
        saddles = pair.array("elastic_band.saddles")
        if len(saddles) > 2:  # of one cycle the barriers say it all
            cycles.append(Points(pair.name, np.arange(len(saddles)), saddles, shade, joined=True, legend=False))
    if not along:
        return []
    panels = [_panel("distance along the path, as a share of its length", "loss", along, None)]
    if cycles:
        panels.append(_panel("cycle (0 is the straight line)", "highest loss on the path", cycles, 1))
    caption = (
        "The loss along a path that was bent to keep it low (markers: its pivots) and on the straight line (dashed) "
        "between the same two solutions: the barrier is how far the solid line rises above its worse end"
        + ("; on the right, how far each cycle brought the highest loss down." if cycles else ".")
    )
    return [Chart("elastic-band", "Paths of least loss between solutions", caption, panels)]


def _path(pair: Pair, losses: np.ndarray, shade: str) -> list[Series]:
    length = pair.get("elastic_band.length") or 1.0
    barrier, straight = (pair.get(f"elastic_band.{name}") for name in ("barrier", "straight_barrier"))
    name = pair.name
    if barrier is not None and straight is not None:
        name += f": barrier {barrier:.3g}, straight {straight:.3g}"
    pivots = pair.array("elastic_band.pivot_positions") / length, pair.array("elastic_band.pivot_losses")
    found: list[Series] = [Line(name, pair.array("elastic_band.positions") / length, losses, shade)]
    return [*found, Points(pair.name, *pivots, shade, legend=False)] if pivots[0].size else found


def _straight(pair: Pair, shade: str) -> list[Series]:
    alphas, losses = pair.array("interpolation.alphas"), pair.array("interpolation.losses")
    if alphas.shape != losses.shape:
        return []
    inside = (alphas >= 0) & (alphas <= 1)
    if not np.isfinite(losses[inside]).any():
        return []
    return [Line(f"{pair.name}, straight", alphas[inside], losses[inside], shade, dashed=True, legend=False)]


def _panel(x_label: str, y_label: str, series: list[Series], step: float | None) -> Panel:
    return Panel(x_label, y_label, series, log_y=spans_decades(np.concatenate([s.y for s in series])), x_step=step)
