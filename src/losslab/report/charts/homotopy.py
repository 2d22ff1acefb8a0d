"""How the curvature set the learning rate."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
    lines = [line for run in runs for line in _layers(run, colours[run.name], alone=len(runs) == 1)]
    panels = [_panel("learning rate η", [line("lr") for line in lines])]
    for key, label in (("hessian_norm", "curvature λ"), ("kappa", "curvature κ")):
        if having := [line for line in lines if line.followed == key]:
            panels.append(_panel(label, [series for line in having for series in line.curvature()]))
    losses = {line.run.name: replace(line, name=line.run.name, colour=colours[line.run.name]) for line in lines}
    panels.append(_panel("loss of the batch", [line("loss") for line in losses.values()]))  # one for all layers
    return [Chart("homotopy", "Learning rate, curvature, loss", CAPTION, panels, columns=3 if len(panels) == 3 else 2)]


@dataclass(frozen=True)
class _Rows:
    """What is drawn of a run, or of one of its layers.

    Attributes:
        run: Whose.
        rows: Its estimates.
        name: In the legend.
        colour: Of its lines.
        legend: Whether it is there.
    """

    run: Run
    rows: Sequence[dict[str, Any]]
    name: str
    colour: str
    legend: bool

    def __call__(self, key: str, colour: str | None = None, *, dashed: bool = False, legend: bool = True) -> Series:
        """The line of one column."""
        x, y = _column(self.rows, "step"), _column(self.rows, key)
        return Line(self.name, x, y, colour or self.colour, dashed=dashed, legend=legend and self.legend)

    @property
    def followed(self) -> str:
        """What the rule follows: λ in the optimizer's metric, or the founders' κ."""
        return "hessian_norm" if self.run.config.get("schedule", {}).get("rule", "stable") == "stable" else "kappa"

    def curvature(self) -> Iterable[Series]:
        """As measured, as reckoned with, and the target."""
        yield self(self.followed)
        yield self("curvature", dashed=True, legend=False)
        yield self("target", GREY, legend=False)


def _layers(run: Run, colour: str, *, alone: bool) -> list[_Rows]:
    """A run, or each of its layers: in the run's colour, or told apart where it is the only run."""
    names = list(dict.fromkeys(row.get("layer") for row in run.homotopy))
    found = []
    for number, layer in enumerate(names):
        rows = [row for row in run.homotopy if row.get("layer") == layer]
        if alone and layer is not None:
            found.append(_Rows(run, rows, layer, PALETTE[number % (len(PALETTE) - 1)], legend=True))
        else:
            found.append(_Rows(run, rows, run.name, colour, legend=number == 0))
    return found


def _panel(label: str, series: Sequence[Series]) -> Panel:
    values = np.concatenate([line.y for line in series])
    return Panel("step", label, series, log_y=spans_decades(values[values > 0]))


def _column(rows: Iterable[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)
