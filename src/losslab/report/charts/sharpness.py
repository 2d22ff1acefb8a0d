"""How much the loss rises nearby."""


import numpy as np

from losslab.report.chart import Chart, Panel, Points, Series, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents


def sharpness(contents: Contents, colours: Colours) -> list[Chart]:
    """The sampled loss increases in the ε-ball, sorted; the sharpness is each curve's end."""
    series: list[Series] = []
    for run in contents.runs:
        increases = np.sort(run.array("sharpness.increases"))  # NaN goes last
        if np.isfinite(increases).any():
            radius = run.get("sharpness.radius")
            name = run.name if radius is None else f"{run.name} (ε = {radius:.3g})"
            share = 100 * np.arange(1, len(increases) + 1) / len(increases)
            series.append(Points(name, share, increases, colours[run.name], joined=True))
    if not series:
        return []
    values = np.concatenate([s.y for s in series if isinstance(s, Points)])
    label = "points with at most this increase (%)"
    panel = Panel(label, "increase of the loss", series, log_y=spans_decades(values))
    caption = (
        "Each marker is the rise of the loss at one random point no further than ε away; a curve's last "
        "marker is the sharpness in the table."
    )
    return [Chart("sharpness", "Loss increase within distance ε", caption, [panel])]
