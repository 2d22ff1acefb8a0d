"""The neural tangent kernel: its eigenvalues, and the training that they predict."""

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents

DECADES_SHOWN = 10.0  # of eigenvalues below the largest: what lies deeper is rounding


def kernel(contents: Contents, colours: Colours) -> list[Chart]:
    """The eigenvalues in order, and the squared error seen, of the network and linearised, on the prediction."""
    spectrum: list[Series] = []
    training: list[Series] = []
    for run in contents.runs:
        values, colour = run.array("kernel.eigenvalues"), colours[run.name]
        if not np.isfinite(values).any():
            continue
        alignment = run.get("kernel.alignment")
        known = isinstance(alignment, float) and np.isfinite(alignment)
        name = f"{run.name} (alignment {alignment:.2f})" if known else run.name
        spectrum.append(Line(name, np.arange(1, len(values) + 1), values, colour))
        predicted, network = run.array("kernel.predicted"), run.array("kernel.network")
        if np.isfinite(predicted).any():
            steps = np.arange(len(predicted))
            training.append(Line(f"{run.name}, predicted", steps, predicted, colour, dashed=True, legend=False))
            linearised, some = run.array("kernel.linearised"), slice(None, None, max(1, len(predicted) // 12))
            training.append(Points(f"{run.name}, linearised", steps[some], linearised[some], colour, legend=False))
            training.append(Line(run.name, steps, network, colour, legend=False))
    if not spectrum:
        return []
    top = max(float(np.nanmax(series.y)) for series in spectrum)
    low = max(min(float(series.y[series.y > 0].min(initial=top)) for series in spectrum), top * 10**-DECADES_SHOWN)
    label = "eigenvalue of the kernel"
    panels = [Panel("rank", label, spectrum, log_y=True, y_range=(low / 1.5, top * 1.5))]
    if training:
        log = spans_decades(np.concatenate([series.y for series in training]))
        panels.append(Panel("step of gradient descent", "squared error", training, log_y=log))
    caption = (
        "Left: the slower the eigenvalues fall, the more functions the network learns at a similar speed; right: the "
        "squared error that they predict (dashed), seen when the linearised network is trained (markers) and when the "
        "network itself is (solid), whose kernel moves where it leaves the dashed line."
    )
    return [Chart("kernel", "The neural tangent kernel", caption, panels)]
