"""The homotopy demo's CSV files -> pictures: loss, rate and curvature of each method."""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Series, colour, spans_decades

CAPTION = (
    "Each method's run with the founders' rate, dashed, or with the best of its tuning, solid; the curvature is κ "
    "where the founders' rule follows it, and λ under the homotopy rate, and the loss is that of each step's batch."
)
COLUMNS = {"loss": "loss", "lr": "learning rate η", "curvature": "curvature reckoned with"}


def charts(folder: Path, experiments: Iterable[str]) -> list[Chart]:
    """A chart for each experiment's file."""
    return [_chart(name, folder / f"{name}.csv") for name in sorted(experiments)]


def _chart(name: str, path: Path) -> Chart:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    shades = list(dict.fromkeys(method.partition(",")[0] for method in methods))
    panels = []
    for column, label in COLUMNS.items():
        series: list[Series] = []
        for method in methods:
            own = [row for row in rows if row["method"] == method]
            steps, values = (np.array([float(row[key]) for row in own]) for key in ("step", column))
            if np.isfinite(values).any():
                plain = method.partition(",")[0]
                shade = colour(shades.index(plain))
                series.append(Line(method, steps, values, shade, dashed=method != plain))
        values = np.concatenate([line.y for line in series])
        panels.append(Panel("step", label, series, log_y=spans_decades(values[values > 0])))
    return Chart(name, f"Learning rates: {name}", CAPTION, panels, columns=3)
