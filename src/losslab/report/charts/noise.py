"""The gradient's noise against the curvature."""


import numpy as np

from losslab.report.chart import Chart, Panel, Points, Series
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents


def noise(contents: Contents, colours: Colours) -> list[Chart]:
    """The top eigenvalues of Hessian and gradient covariance, joined: the slope is the noise ratio."""
    series: list[Series] = []
    for run in contents.runs:
        tops = [run.get("noise.hessian_top"), run.get("noise.covariance_top")]
        if all(isinstance(top, float | int) for top in tops):
            errors = [run.get("noise.hessian_error"), run.get("noise.covariance_error")]
            where = np.array(["Hessian λ_H", "gradient covariance λ_C"])
            values, bars = np.array(tops, dtype=float), np.array(errors, dtype=float)
            series.append(Points(run.name, where, values, colours[run.name], bars, joined=True))
    if not series:
        return []
    values = np.concatenate([s.y for s in series if isinstance(s, Points)])
    panel = Panel("", "top eigenvalue", series, log_y=bool((values > 0).all()))
    caption = (
        "A line that rises means the gradient's noise is stronger than the curvature (ratio λ_C / λ_H above "
        "1), one that falls that curvature rules."
    )
    return [Chart("noise", "Gradient noise against curvature", caption, [panel])]
