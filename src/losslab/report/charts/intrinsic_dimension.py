"""Training in random subspaces: what was reached in how many dimensions."""

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Run

_NAMES = {"accuracy": "accuracies", "loss": "losses"}


def intrinsic_dimension(contents: Contents, colours: Colours) -> list[Chart]:
    """For each measure a panel: every training over its dimension, and each run's threshold as a dashed line."""
    panels = []
    for measure in _NAMES:
        runs = [run for run in contents.runs if run.get("intrinsic_dimension.measure") == measure]
        series: list[Series] = []
        for run in runs:
            series += _series(run, measure, colours[run.name])
        if series:
            values = np.concatenate([s.y for s in series])
            label = f"{measure} (%)" if measure == "accuracy" else measure
            log = measure == "loss" and spans_decades(values)
            panels.append(Panel("dimension d of the subspace, as log₁₀ d", label, series, log_y=log))
    caption = (
        "Each marker is one training in a random subspace of d dimensions (at the far right: of all parameters, where "
        "these are the baseline), the dashed line what counts as solved: the intrinsic dimension is where the markers "
        "reach it."
    )
    return [Chart("intrinsic-dimension", "Training in random subspaces", caption, panels)] if panels else []


def _series(run: Run, measure: str, colour: str) -> list[Series]:
    split = run.get("intrinsic_dimension.split")
    dimensions, values = (
        np.concatenate([run.array(f"intrinsic_dimension.{table}.{column}") for table in ("trials", "full")])
        for column in ("dimensions", f"{split}_{_NAMES[measure]}")
    )
    if not np.isfinite(values).any():
        return []
    scale = 100.0 if measure == "accuracy" else 1.0
    found, value = run.array("intrinsic_dimension.found"), run.get("intrinsic_dimension.value")
    name = f"{run.name}: d = {value:.4g}" if found.size else run.name
    order = np.argsort(dimensions, kind="stable")
    places = np.log10(dimensions[order])
    ends = np.array([places[0] - 0.1, places[-1] + 0.1])  # a tenth of a decade beyond, also where there is one place
    threshold = np.full(2, scale * run.get("intrinsic_dimension.threshold"))
    return [
        Points(name, places, scale * values[order], colour),
        Line(f"{run.name}, threshold", ends, threshold, colour, dashed=True, legend=False),
    ]
