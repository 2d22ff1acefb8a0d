"""What SGD with a finite step descends: the loss and its penalties."""

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, colour, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Run

TERMS = {"losses": "loss L", "gd_penalties": "(η/4)‖g‖²", "noise_penalties": "(η/4) E‖g_B − g‖²"}
STEPS = {
    "gradient_steps": "plain",
    "sgd_corrections": "by SGD",
    "gd_corrections": "by GD",
    "quoted_corrections": "quoted",
}


def implicit_bias(contents: Contents, colours: Colours) -> list[Chart]:
    """The terms of the modified loss and the lengths of the steps they cause; curves where a run has several points."""
    runs = [run for run in contents.runs if np.isfinite(run.array("implicit_bias.modified")).any()]
    if not runs:
        return []
    if all(len(run.array("implicit_bias.modified")) == 1 for run in runs):
        lengths = "length of the step, and of its bending"
        panels = [_bars(runs, colours, TERMS, "loss"), _bars(runs, colours, STEPS, lengths)]
        caption = (
            "Left: the training loss and the two penalties that finite steps add to it, of the mean gradient and of "
            "the batches' noise; right: how long a plain step is and by how much the penalties of SGD and of "
            "full-batch descent bend it, beside the term as it is often quoted."
        )
        return [Chart("implicit-bias", "The loss that SGD descends", caption, panels)]
    panels = [_curves(runs, TERMS, "loss"), _alignment(runs, colours)]
    caption = (
        "Left: the training loss and the two penalties that finite steps add to it, along the points measured; right: "
        "whether the batches' gradients agree (1: all alike, 0: at right angles), and, dashed, whether the way down "
        "the loss is a way down the penalty too."
    )
    return [Chart("implicit-bias", "The loss that SGD descends", caption, panels)]


def _bars(runs: list[Run], colours: Colours, names: dict[str, str], label: str) -> Panel:
    """One point a run: the terms side by side."""
    where = np.array(list(names.values()))
    series: list[Series] = [
        Points(run.name, where, np.array([run.array(f"implicit_bias.{n}")[0] for n in names]), colours[run.name])
        for run in runs
    ]
    return Panel("", label, series, log_y=all(bool((s.y > 0).all()) for s in series))


def _curves(runs: list[Run], names: dict[str, str], label: str) -> Panel:
    """A colour a term, for each run."""
    series: list[Series] = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        for index, (name, text) in enumerate(names.items()):
            values = run.array(f"implicit_bias.{name}")
            series.append(Line(prefix + text, np.arange(len(values)), values, colour(index)))
    log = spans_decades(np.concatenate([s.y for s in series]))
    return Panel("point", label, series, log_y=log)


def _alignment(runs: list[Run], colours: Colours) -> Panel:
    series: list[Series] = []
    for run in runs:
        for name, dashed in (("batch_cosines", False), ("penalty_cosines", True)):
            values = run.array(f"implicit_bias.{name}")
            text = f"{run.name}, {'loss and penalty' if dashed else 'batches'}"
            steps = np.arange(len(values))
            series.append(Line(text, steps, values, colours[run.name], dashed=dashed, legend=len(runs) == 1))
    return Panel("point", "cosine", series)
