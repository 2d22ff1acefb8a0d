"""How a training went: its loss, its curvature against the optimizer's bound, and its path in the plane."""

import numpy as np

from losslab.report.chart import PALETTE, Chart, Line, Panel, Points, Series, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Run

_TEST, _OTHER, _BOUND = PALETTE[4], PALETTE[5], PALETTE[-1]


def trajectory(contents: Contents, colours: Colours) -> list[Chart]:
    """For each run three panels: losses, largest eigenvalues with the bound, principal plane."""
    charts = []
    for index, run in enumerate(contents.runs):
        if np.isfinite(run.array("trajectory.losses_train")).any():
            panels = [_losses(run, colours[run.name]), _curvature(run, colours[run.name])]
            if np.isfinite(run.array("trajectory.path.coordinates")).all():
                panels.append(_path(run, colours[run.name]))
            charts.append(
                Chart(f"trajectory-{index + 1}", f"Training trajectory: {run.name}", _caption(run), panels, 3)
            )
    return charts


def _losses(run: Run, colour: str) -> Panel:
    steps = run.array("trajectory.steps")
    series: list[Series] = [Points("training loss", steps, run.array("trajectory.losses_train"), colour, joined=True)]
    if (test := run.array("trajectory.losses_test")).size:
        series.append(Line("test loss", steps, test, _TEST, dashed=True))
    values = np.concatenate([s.y for s in series])
    return Panel("optimizer step", "loss", series, "Loss", log_y=spans_decades(values))


def _curvature(run: Run, colour: str) -> Panel:
    """What stability depends on with its bound; the Hessian's own eigenvalue beside it where that is another."""
    steps, plain = run.array("trajectory.steps"), run.array("trajectory.lambda_max")
    decisive, bounds = run.array("trajectory.preconditioned"), run.array("trajectory.bounds")
    series: list[Series] = []
    if not np.isfinite(decisive).any():
        series.append(
            Points("λ of the Hessian", steps, plain, colour, run.array("trajectory.lambda_max_errors"), joined=True)
        )
    else:
        errors = run.array("trajectory.preconditioned_errors")
        same = np.allclose(decisive, plain, rtol=0.1, equal_nan=True)
        name = "λ of the Hessian" if same else "λ, preconditioned"
        series.append(Points(name, steps, decisive, colour, errors, joined=True))
        if not same:
            series.append(Line("λ of the Hessian", steps, plain, _OTHER))
    if np.isfinite(bounds).any():
        series.append(Line("bound", steps, bounds, _BOUND, dashed=True))
    values = np.concatenate([s.y for s in series])
    return Panel("optimizer step", "largest eigenvalue", series, "Edge of stability", log_y=spans_decades(values))


def _path(run: Run, colour: str) -> Panel:
    x, y = run.array("trajectory.path.coordinates").T
    series: list[Series] = [
        Points("path", x, y, colour, joined=True, legend=False),
        Points("start", x[:1], y[:1], _BOUND),
        Points("end", x[-1:], y[-1:], _TEST),
    ]
    labels = [
        f"{which} direction: {share:.0%} (random walk {walk:.0%})"
        for which, share, walk in zip(
            ("first", "second"),
            [*run.array("trajectory.path.explained")[:2], 0.0, 0.0],
            [*run.array("trajectory.path.random_walk")[:2], 0.0, 0.0],
            strict=False,
        )
    ]
    return Panel(labels[0], labels[1], series, "Principal plane of the path")


def _caption(run: Run) -> str:
    above = run.array("trajectory.preconditioned") - run.array("trajectory.preconditioned_errors")
    beyond = int((above > run.array("trajectory.bounds")).sum())
    count = run.array("trajectory.steps").size
    return (
        f"Where the largest eigenvalue is above its dashed bound ({beyond} of {count} snapshots) the step is too long "
        "for the sharpest direction, and the weights swing along it until the network has left the sharp place; "
        "the path's plane shows something only as far as its shares of the variance exceed those of a random walk."
    )
