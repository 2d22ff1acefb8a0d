"""How the curvature set the learning rate."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from losslab.report.chart import PALETTE, Chart, Line, Panel, Series, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Run

GREY = PALETTE[-1]
CAPTION = (
    "What each estimate found and did: solid the learning rate, the curvature as it was measured and the batch's loss, "
    "dashed the curvature that the rule reckons with, and grey its target, from which on λ brakes the rate; a line for "
    "each layer where layers have rates of their own."
)


def homotopy(contents: Contents, colours: Colours) -> list[Chart]:
    """Learning rate, curvature and loss over the steps, of the runs with the schedule homotopy."""
    runs = [run for run in contents.runs if run.homotopy]
    if not runs:
        return []
    panels = [_panel("learning rate η", [line for run in runs for line in _lines(run, "lr", colours[run.name])])]
    for key, label in (("hessian_norm", "curvature λ"), ("kappa", "curvature κ")):
        if having := [run for run in runs if _followed(run) == key]:
            panels.append(_panel(label, [line for run in having for line in _curvature(run, key, colours[run.name])]))
    losses = [next(iter(_lines(run, "loss", colours[run.name]))) for run in runs]  # one for all layers
    panels.append(_panel("loss of the batch", losses))
    return [Chart("homotopy", "Learning rate, curvature, loss", CAPTION, panels, columns=3 if len(panels) == 3 else 2)]


def _followed(run: Run) -> str:
    """What the rule follows: λ in the optimizer's metric, or the founders' κ."""
    return "hessian_norm" if run.config.get("schedule", {}).get("rule", "stable") == "stable" else "kappa"


def _curvature(run: Run, key: str, colour: str) -> Iterable[Series]:
    yield from _lines(run, key, colour)
    yield from _lines(run, "curvature", colour, dashed=True, legend=False)
    yield from _lines(run, "target", GREY, legend=False)


def _panel(label: str, series: Sequence[Series]) -> Panel:
    values = np.concatenate([line.y for line in series])
    return Panel("step", label, series, log_y=spans_decades(values[values > 0]))


def _lines(run: Run, key: str, colour: str, *, dashed: bool = False, legend: bool = True) -> Iterable[Series]:
    """One, or one for each layer, of which the first is in the legend."""
    for layer in dict.fromkeys(row.get("layer") for row in run.homotopy):
        rows = [row for row in run.homotopy if row.get("layer") == layer]
        yield Line(run.name, _column(rows, "step"), _column(rows, key), colour, dashed=dashed, legend=legend)
        legend = False


def _column(rows: Iterable[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)
