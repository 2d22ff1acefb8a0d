"""Planes and lines through a solution -> charts: one surface and one map a run, all on one common scale."""

import re
from collections.abc import Sequence

import numpy as np

from losslab.report.chart import LOG_FROM, Chart, Contour, Line, Panel, Series, Surface, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents

CLIP_FACTOR = 100.0  # walls are cut at this multiple of the median loss: one of 1e9 would flatten all else


def planes(contents: Contents, colours: Colours) -> list[Chart]:
    """For each run's plane the surface and the map, between the same losses for all runs."""
    areas = {run.name: losses for run in contents.runs if _is_area(losses := run.array("plane.losses"))}
    if not areas:
        return []
    low, high = _common_range(list(areas.values()))
    log = low > 0 and high / low > LOG_FROM
    slugs, found = _slugs(list(areas)), []
    lines = "each line is the same ratio of losses" if log else "each line is the same step of the loss"
    for run in (run for run in contents.runs if run.name in areas):
        losses, slug = areas[run.name], slugs[run.name]
        values = (run.array("plane.alphas"), run.array("plane.betas"), losses, low, high, log)
        notes = f"{lines}, close lines are steep{_plane_notes(losses, high)}."
        caption = f"Height and colour are the loss around the solution in the centre; {notes}"
        surface = [Panel("first direction α", "second direction β", [Surface(*values)])]
        found.append(Chart(f"surface-{slug}", f"Loss surface: {run.name}", caption, surface))
        caption = f"The same plane from above, the cross marks the solution; {notes}"
        contours = [Panel("first direction α", "second direction β", [Contour(*values)])]
        found.append(Chart(f"map-{slug}", f"Loss map: {run.name}", caption, contours))
    return found


def slices(contents: Contents, colours: Colours) -> list[Chart]:
    """The loss along one direction."""
    series: list[Series] = []
    for run in contents.runs:
        losses = run.array("line.losses")
        if losses.size and np.isfinite(losses).any():
            series.append(Line(run.name, run.array("line.alphas"), losses, colours[run.name]))
    if not series:
        return []
    log = spans_decades(np.concatenate([line.y for line in series if isinstance(line, Line)]))
    panel = Panel("direction α", "loss", series, log_y=log, guides=(0.0,))
    caption = (
        "The loss along one random filter-normalised direction through the solution at zero: narrow valleys are sharp."
    )
    return [Chart("slices", "Loss along a line", caption, [panel])]


def _common_range(planes: Sequence[np.ndarray]) -> tuple[float, float]:
    """The losses that are drawn: from the smallest to the largest, walls cut off."""
    losses = np.concatenate([plane.ravel() for plane in planes])
    finite = losses[np.isfinite(losses)]
    low, middle = float(finite.min()), float(np.median(finite))
    high = min(float(finite.max()), max(middle, CLIP_FACTOR * abs(middle)))
    return low, high if high > low else low + max(abs(low), 1.0)


def _plane_notes(losses: np.ndarray, high: float) -> str:
    cut, holes = int(np.sum(losses > high)), int(np.isnan(losses).sum())
    clipped = f"; {cut} of {losses.size} values above {high:.3g} are drawn at {high:.3g}" if cut else ""
    return clipped + (f"; {holes} of {losses.size} points have no value and stay empty" if holes else "")


def _is_area(losses: np.ndarray) -> bool:
    """Whether at least one cell of a grid has all its four corners: less cannot be drawn."""
    if losses.ndim != 2:
        return False
    known = ~np.isnan(losses)
    cells = known[1:, 1:] & known[:-1, 1:] & known[1:, :-1] & known[:-1, :-1]
    return bool(cells.any() and np.isfinite(losses).any())


def _slugs(names: Sequence[str]) -> dict[str, str]:
    """A file name for each run: plain characters only, and no two alike."""
    plain = [re.sub(r"[^A-Za-z0-9._-]+", "-", name) for name in names]
    unique = [slug if plain.count(slug) == 1 else f"{slug}-{index}" for index, slug in enumerate(plain)]
    return dict(zip(names, unique, strict=True))
