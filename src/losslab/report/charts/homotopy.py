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
    "dashed the curvature that the rule reckons with, and grey its target, from which on λ brakes the rate."
)


def homotopy(contents: Contents, colours: Colours) -> list[Chart]:
    """Learning rate, curvature and loss over the steps, of the runs with the schedule homotopy."""
    runs = [run for run in contents.runs if run.homotopy]
    if not runs:
        return []
    panels = [_panel("learning rate η", [_line(run, "lr", colours[run.name]) for run in runs])]
    for key, label in (("hessian_norm", "curvature λ"), ("kappa", "curvature κ")):
        if having := [run for run in runs if _followed(run) == key]:
            panels.append(_panel(label, [line for run in having for line in _curvature(run, key, colours[run.name])]))
    panels.append(_panel("loss of the batch", [_line(run, "loss", colours[run.name]) for run in runs]))
    return [Chart("homotopy", "Learning rate, curvature, loss", CAPTION, panels, columns=3 if len(panels) == 3 else 2)]


def _followed(run: Run) -> str:
    """What the rule follows: λ in the optimizer's metric, or the founders' κ."""
    return "hessian_norm" if run.config.get("schedule", {}).get("rule", "stable") == "stable" else "kappa"


def _curvature(run: Run, key: str, colour: str) -> Iterable[Series]:
    yield _line(run, key, colour)
    yield _line(run, "curvature", colour, dashed=True, legend=False)
    yield _line(run, "target", GREY, legend=False)


def _panel(label: str, series: Sequence[Series]) -> Panel:
    values = np.concatenate([line.y for line in series])
    return Panel("step", label, series, log_y=spans_decades(values[values > 0]))


def _line(run: Run, key: str, colour: str, *, dashed: bool = False, legend: bool = True) -> Series:
    rows = run.homotopy
    return Line(run.name, _column(rows, "step"), _column(rows, key), colour, dashed=dashed, legend=legend)


def _column(rows: Iterable[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)
