"""The gradient's noise against the curvature, and against the gradient."""

from collections.abc import Sequence

import numpy as np

from losslab.report.chart import PALETTE, Chart, Line, Panel, Points, Series
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Run

_MOST_CHARACTERS = 40  # of names that stand beside each other on an axis


def noise(contents: Contents, colours: Colours) -> list[Chart]:
    """The top eigenvalues of Hessian and gradient covariance, joined; and each tensor's signal against its noise."""
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
    panels = [Panel("", "top eigenvalue", series, log_y=bool((values > 0).all())), *_by_tensor(contents.runs, colours)]
    caption = (
        "A line that rises means the gradient's noise is stronger than the curvature (ratio λ_C / λ_H above "
        "1), one that falls that curvature rules"
    )
    if len(panels) > 1:
        caption += (
            "; on the other side a marker is the part of the gradient in one parameter tensor, squared, over the "
            "variance of a single example's, and near the dashed line it cannot be told from noise"
        )
    return [Chart("noise", "Gradient noise against curvature", f"{caption}.", panels)]


def _by_tensor(runs: Sequence[Run], colours: Colours) -> list[Panel]:
    """Signal to noise of each parameter tensor, with the level 1/N of noise alone."""
    series: list[Series] = []
    names: list[str] = []
    floors: dict[int, Line] = {}
    for run in runs:
        ratios = run.array("noise.tensor_signal_to_noise")
        if not (np.isfinite(ratios) & (ratios > 0)).any():
            continue
        names = list(run.get("noise.tensors"))
        x = np.array(names) if _fit(names) else np.arange(1.0, len(names) + 1)
        series.append(Points(run.name, x, ratios, colours[run.name], joined=True))
        num = run.get("noise.num_examples")
        floors[num] = Line(f"noise alone, N = {num}", x, np.full(len(names), 1 / num), PALETTE[-1], dashed=True)
    if not series:
        return []
    label = "" if _fit(names) else "parameter tensor, in the network's order"
    return [Panel(label, "signal to noise", [*series, *floors.values()], log_y=True)]


def _fit(names: Sequence[str]) -> bool:
    return sum(map(len, names)) <= _MOST_CHARACTERS
