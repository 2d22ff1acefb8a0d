"""How much the loss rises nearby."""

import math

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Run

_KINDS = ("points", "ascents", "groups")  # what an increase belongs to


def sharpness(contents: Contents, colours: Colours) -> list[Chart]:
    """The increases of the loss within the radius, sorted, beside what a quadratic loss would do; a panel a kind."""
    panels = []
    for kind in _KINDS:
        series: list[Series] = []
        for run in (run for run in contents.runs if _kind(run) == kind):
            series += _run(run, colours[run.name])
        if series:
            values = np.concatenate([s.y for s in series if isinstance(s, Points | Line)])
            label = f"{kind} with at most this increase (%)"
            panels.append(Panel(label, "increase of the loss", series, log_y=spans_decades(values)))
    if not panels:
        return []
    caption = (
        "Each marker is the rise of the loss at a random point no further than ε away (or at the end of an ascent, or "
        "the worst for a group of examples); a curve's last marker is the sharpness in the table, and where it is far "
        "from what the curvature alone gives (½ε²λ, in the legend or dashed), random points have missed the sharp "
        "directions, or the loss is no parabola this far out."
    )
    return [Chart("sharpness", "Loss increase within distance ε", caption, panels)]


def _run(run: Run, colour: str) -> list[Series]:
    increases = np.sort(run.array("sharpness.increases"))  # NaN goes last
    if not np.isfinite(increases).any():
        return []
    radius, quadratic = run.get("sharpness.radius"), run.get("sharpness.quadratic")
    known = isinstance(quadratic, int | float) and math.isfinite(quadratic)
    notes = [] if radius is None else [f"ε = {radius:.3g}"]
    notes += [f"quadratic {quadratic:.3g}"] if known else []
    name = f"{run.name} ({', '.join(notes)})" if notes else run.name
    share = 100 * np.arange(1, len(increases) + 1) / len(increases)
    found: list[Series] = [Points(name, share, increases, colour, joined=True)]
    if known and run.get("sharpness.method") != "ball":  # the worst case would flatten the rises of random points
        ends = np.array([share[0], 100.0])
        level = np.full(2, float(quadratic))
        found.append(Line(f"{run.name}, quadratic", ends, level, colour, dashed=True, legend=False))
    return found


def _kind(run: Run) -> str:
    if run.get("sharpness.m") is not None:
        return "groups"
    return "ascents" if run.get("sharpness.method") in ("ascent", "adaptive") else "points"
