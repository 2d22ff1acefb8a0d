"""The Hessian's eigenvalues: both ends, and their density."""

from collections.abc import Sequence

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, spans_decades
from losslab.report.charts.common import Colours, dodged
from losslab.report.contents import Contents

DECADES_SHOWN = 6.0  # of a density below its peak: what lies deeper is the kernel's tail


def spectrum(contents: Contents, colours: Colours) -> list[Chart]:
    """The largest and the smallest eigenvalues of the Hessian with their residual bounds."""
    panels = []
    for end, title in (("top", "largest"), ("smallest", "smallest")):
        series: list[Series] = []
        for run, shift in dodged(contents.runs, f"spectrum.{end}"):
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
    return [Chart("spectrum", "Ends of the Hessian's spectrum", caption, panels)] if panels else []


def density(contents: Contents, colours: Colours) -> list[Chart]:
    """The smoothed spectral density; a panel a run where the spectra differ too much to share an axis."""
    series: list[Line] = []
    for run in contents.runs:
        grid, height = run.array("spectrum.density.grid"), run.array("spectrum.density.density")
        if len(grid) and np.isfinite(height).any() and np.nanmax(height) > 0:
            error = run.array("spectrum.density.standard_error")
            series.append(Line(run.name, grid, height, colours[run.name], error if len(error) else None))
    if not series:
        return []
    widths = [np.ptp(line.x) for line in series]
    groups = [[line] for line in series] if max(widths) > 4 * min(widths) else [series]
    panels = [_density_panel(group) for group in groups]
    caption = (
        "The area under a curve over an interval is the fraction of eigenvalues in it (band: one standard "
        "error), so the peak at zero is the many flat directions and bumps far to the right are the "
        "few sharp ones."
    )
    columns = 3 if len(groups) > 1 else 1
    return [Chart("density", "Spectral density of the Hessian", caption, panels, columns)]


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
