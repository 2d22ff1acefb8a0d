"""One function a probe: records of the runs -> a `Chart`, or None where no run was measured.

The runs of a study share a picture, each in one colour through all pictures; the planes are in `landscapes`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, colour, spans_decades
from losslab.report.contents import Contents, Pair, Run
from losslab.report.landscapes import landscapes, slices

FEW_EPOCHS = 12  # that each get a tick, since there are no half epochs
DECADES_SHOWN = 6.0  # of a density below its peak: what lies deeper is the kernel's tail


def charts(contents: Contents) -> list[Chart]:
    """All pictures that the folder's records allow, in the page's order."""
    colours = {run.name: colour(index) for index, run in enumerate(contents.runs)}
    found = [
        training(contents.runs, colours),
        spectrum(contents.runs, colours),
        density(contents.runs, colours),
        *landscapes(contents.runs),
        slices(contents.runs, colours),
        sharpness(contents.runs, colours),
        noise(contents.runs, colours),
        interpolation(contents.pairs, colours),
    ]
    return [chart for chart in found if chart is not None]


def training(runs: Sequence[Run], colours: dict[str, str]) -> Chart | None:
    """Loss and accuracy over the epochs, on the training and the validation split."""
    runs = [run for run in runs if run.epochs]
    panels = []
    for quantity, label in (("loss", "loss"), ("accuracy", "accuracy (%)")):
        scale = 1.0 if quantity == "loss" else 100.0
        series: list[Series] = []
        for run in runs:
            epochs = np.array([row["epoch"] for row in run.epochs], dtype=float)
            for split in ("train", "validation"):
                values = scale * _column(run.epochs, f"{split}_{quantity}")
                if np.isfinite(values).any():
                    dashed = split == "validation"
                    name = f"{run.name}, validation" if dashed else run.name
                    line = Line(name, epochs, values, colours[run.name], dashed=dashed, legend=not dashed)
                    series.append(line)
        if series:
            log = quantity == "loss" and spans_decades(np.concatenate([s.y for s in series]))
            step = 1 if max(len(run.epochs) for run in runs) <= FEW_EPOCHS else None
            panels.append(Panel("epoch", label, series, log_y=log, x_step=step))
    caption = (
        "Solid lines are the training examples, each taken before its step, dashed ones the validation split after the "
        "epoch: a dashed loss that turns upwards while the solid one falls is overfitting."
    )
    return Chart("training", "Training curves", caption, panels) if panels else None


def spectrum(runs: Sequence[Run], colours: dict[str, str]) -> Chart | None:
    """The largest and the smallest eigenvalues of the Hessian with their residual bounds."""
    panels = []
    for end, title in (("top", "largest"), ("smallest", "smallest")):
        series: list[Series] = []
        for run, shift in _dodged(runs, f"spectrum.{end}"):
            values = run.array(f"spectrum.{end}")
            index = np.arange(1, len(values) + 1) + shift
            errors = run.array(f"spectrum.{end}_errors")
            series.append(Points(run.name, index, values, colours[run.name], errors))
        if series:
            log = spans_decades(np.concatenate([s.y for s in series]))
            label = f"{title} eigenvalues"
            panels.append(Panel(f"rank, counted from the {title}", label, series, log_y=log, x_step=1))
    caption = (
        "Each marker is an eigenvalue of the Hessian with its residual bound as bar (often smaller than the "
        "marker): high values on the left are sharp directions, negative ones on the right are directions "
        "that still lead downhill."
    )
    return Chart("spectrum", "Ends of the Hessian's spectrum", caption, panels) if panels else None


def density(runs: Sequence[Run], colours: dict[str, str]) -> Chart | None:
    """The smoothed spectral density; a panel a run where the spectra differ too much to share an axis."""
    series: list[Line] = []
    for run in runs:
        grid, height = run.array("spectrum.density.grid"), run.array("spectrum.density.density")
        if len(grid) and np.isfinite(height).any() and np.nanmax(height) > 0:
            error = run.array("spectrum.density.standard_error")
            series.append(Line(run.name, grid, height, colours[run.name], error if len(error) else None))
    if not series:
        return None
    widths = [np.ptp(line.x) for line in series]
    groups = [[line] for line in series] if max(widths) > 4 * min(widths) else [series]
    panels = [_density_panel(group) for group in groups]
    caption = (
        "The area under a curve over an interval is the fraction of eigenvalues in it (band: one standard "
        "error), so the peak at zero is the many flat directions and bumps far to the right are the "
        "few sharp ones."
    )
    columns = 3 if len(groups) > 1 else 1
    return Chart("density", "Spectral density of the Hessian", caption, panels, columns)


def _density_panel(lines: Sequence[Line]) -> Panel:
    top = max(float(np.nanmax(line.y)) for line in lines)
    return Panel(
        "eigenvalue of the Hessian",
        "density (log scale)",
        lines,
        log_y=True,
        y_range=(top * 10**-DECADES_SHOWN, 3 * top),
        guides=(0.0,),
    )


def sharpness(runs: Sequence[Run], colours: dict[str, str]) -> Chart | None:
    """The sampled loss increases in the ε-ball, sorted; the sharpness is each curve's end."""
    series: list[Series] = []
    for run in runs:
        increases = np.sort(run.array("sharpness.increases"))  # NaN goes last
        if np.isfinite(increases).any():
            radius = run.get("sharpness.radius")
            name = run.name if radius is None else f"{run.name} (ε = {radius:.3g})"
            share = 100 * np.arange(1, len(increases) + 1) / len(increases)
            series.append(Points(name, share, increases, colours[run.name], joined=True))
    if not series:
        return None
    values = np.concatenate([s.y for s in series if isinstance(s, Points)])
    label = "points with at most this increase (%)"
    panel = Panel(label, "increase of the loss", series, log_y=spans_decades(values))
    caption = (
        "Each marker is the rise of the loss at one random point no further than ε away; a curve's last "
        "marker is the sharpness in the table."
    )
    return Chart("sharpness", "Loss increase within distance ε", caption, [panel])


def noise(runs: Sequence[Run], colours: dict[str, str]) -> Chart | None:
    """The top eigenvalues of Hessian and gradient covariance, joined: the slope is the noise ratio."""
    series: list[Series] = []
    for run in runs:
        tops = [run.get("noise.hessian_top"), run.get("noise.covariance_top")]
        if all(isinstance(top, float | int) for top in tops):
            errors = [run.get("noise.hessian_error"), run.get("noise.covariance_error")]
            where = np.array(["Hessian λ_H", "gradient covariance λ_C"])
            values, bars = np.array(tops, dtype=float), np.array(errors, dtype=float)
            series.append(Points(run.name, where, values, colours[run.name], bars, joined=True))
    if not series:
        return None
    values = np.concatenate([s.y for s in series if isinstance(s, Points)])
    panel = Panel("", "top eigenvalue", series, log_y=bool((values > 0).all()))
    caption = (
        "A line that rises means the gradient's noise is stronger than the curvature (ratio λ_C / λ_H above "
        "1), one that falls that curvature rules."
    )
    return Chart("noise", "Gradient noise against curvature", caption, [panel])


def interpolation(pairs: Sequence[Pair], colours: dict[str, str]) -> Chart | None:
    """The loss on the straight line through two solutions, with the two ends marked."""
    series: list[Series] = []
    for index, pair in enumerate(pairs):
        alphas, losses = (np.asarray(pair.record.get(key, ()), dtype=float) for key in ("alphas", "losses"))
        if np.isfinite(losses).any():
            barrier = pair.record.get("barrier")
            name = pair.name if barrier is None else f"{pair.name}: barrier {barrier:.3g}"
            series.append(Line(name, alphas, losses, colour(len(colours) + index)))
            for end, alpha, run in (("loss_a", 0.0, pair.first), ("loss_b", 1.0, pair.second)):
                if pair.record.get(end) is not None:
                    mark = np.array([alpha]), np.array([pair.record[end]], dtype=float)
                    series.append(Points(run, *mark, colours.get(run, colour(index)), legend=False))
    if not series:
        return None
    losses = np.concatenate([s.y for s in series if isinstance(s, Line)])
    label = "α along the line (0 and 1 are the two solutions)"
    panel = Panel(label, "loss", series, log_y=spans_decades(losses), guides=(0.0, 1.0))
    caption = (
        "The loss from the first solution (α = 0) to the second (α = 1) and beyond: a hill between the "
        "markers is a barrier, a flat floor means one connected valley."
    )
    return Chart("interpolation", "Straight lines between solutions", caption, [panel])


def _column(rows: Iterable[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)


def _dodged(runs: Sequence[Run], dotted: str) -> list[tuple[Run, float]]:
    """The runs that have the array, each with a small shift in x, so that bars do not cover each other."""
    having = [run for run in runs if run.array(dotted).size]
    step = min(0.12, 0.5 / max(len(having), 1))
    return [(run, step * (index - (len(having) - 1) / 2)) for index, run in enumerate(having)]
