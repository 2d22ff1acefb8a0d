"""Planes and lines through a solution -> charts: one surface and one map a run, all on one common scale."""

import re
from collections.abc import Sequence

import numpy as np

from losslab.report.chart import (
    LOG_FROM,
    PALETTE,
    Chart,
    Contour,
    Line,
    Panel,
    Points,
    Series,
    Surface,
    colour,
    spans_decades,
)
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Run

CLIP_FACTOR = 100.0  # walls are cut at this multiple of the median loss: one of 1e9 would flatten all else
_KINDS = {
    "filter": "one random filter-normalised direction",
    "layer": "one random layer-normalised direction",
    "eigenvectors": "the Hessian's top eigenvector",
    "pca": "the first principal component of the training path",
    "solutions": "the line through two solutions",
    "given": "a given direction",
}


def planes(contents: Contents, colours: Colours) -> list[Chart]:
    """For each run's plane the surface and the map, between the same losses for all runs."""
    grids = {run.name: _known(run) for run in contents.runs}
    areas = {name: grid for name, grid in grids.items() if _is_area(grid[2])}
    if not areas:
        return []
    low, high = _common_range([losses for _, _, losses in areas.values()])
    log = low > 0 and high / low > LOG_FROM
    slugs, found = _slugs(list(areas)), []
    lines = "each line is the same ratio of losses" if log else "each line is the same step of the loss"
    for run in (run for run in contents.runs if run.name in areas):
        alphas, betas, losses = areas[run.name]
        values, slug = (alphas, betas, losses, low, high, log), slugs[run.name]
        notes = f"{lines}, close lines are steep{_plane_notes(run, losses, high)}"
        caption = f"Height and colour are the loss around {_origin(run)}; {notes}."
        labels = _axis_label(run, 0, "first direction α"), _axis_label(run, 1, "second direction β")
        surface = [Panel(*labels, [Surface(*values)])]
        found.append(Chart(f"surface-{slug}", f"Loss surface: {run.name}", caption, surface))
        points, told = _points(run, alphas, betas)
        caption = f"The same plane from above, the cross marks {_origin(run)}; {notes}{told}."
        contours = [Panel(*labels, [Contour(*values), *points])]
        found.append(Chart(f"map-{slug}", f"Loss map: {run.name}", caption, contours))
    return found


def slices(contents: Contents, colours: Colours) -> list[Chart]:
    """The loss along one direction."""
    series: list[Series] = []
    kinds: list[str] = []
    for run in contents.runs:
        losses = run.array("line.losses")
        known = ~np.isnan(losses)
        if losses.size and np.isfinite(losses).any():
            series.append(Line(run.name, run.array("line.alphas")[known], losses[known], colours[run.name]))
            kinds.append(_KINDS.get(run.get("line.normalization"), "one direction"))
    if not series:
        return []
    log = spans_decades(np.concatenate([line.y for line in series if isinstance(line, Line)]))
    panel = Panel("direction α", "loss", series, log_y=log, guides=(0.0,))
    along = " or ".join(dict.fromkeys(kinds))
    caption = f"The loss along {along}, with the solution at zero: narrow valleys are sharp."
    return [Chart("slices", "Loss along a line", caption, [panel])]


def _known(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The axes and losses of a run's plane; of one that was stopped, the rows and columns that are complete."""
    alphas, betas, losses = (run.array(f"plane.{name}") for name in ("alphas", "betas", "losses"))
    stride = int(run.get("plane.stride") or 1)
    columns, rows = (slice(len(axis) // 2 % stride, None, stride) for axis in (alphas, betas))
    return (alphas[columns], betas[rows], losses[rows, columns]) if losses.ndim == 2 else (alphas, betas, losses)


def _origin(run: Run) -> str:
    where = {"solutions": "the first solution", "pca": "the solution"}
    return where.get(run.get("plane.normalization"), "the solution in the centre")


def _axis_label(run: Run, index: int, plain: str) -> str:
    """The direction's name, with its eigenvalue or the share of the path's variance that it explains."""
    values, kind = run.array("plane.values"), run.get("plane.normalization")
    if len(values) != 2:
        return plain
    value = f"eigenvalue {values[index]:.3g}" if kind == "eigenvectors" else f"{values[index]:.0%} of the path"
    return f"{value}: {plain}"


def _points(run: Run, alphas: np.ndarray, betas: np.ndarray) -> tuple[list[Series], str]:
    """The solutions, or the path with its distance from the plane as colour, and what the caption says of them."""
    x, y, away = (run.array(f"plane.points.{name}") for name in ("alphas", "betas", "residuals"))
    inside = (x >= alphas[0]) & (x <= alphas[-1]) & (y >= betas[0]) & (y <= betas[-1])
    if not inside.any():
        return [], ""
    if run.get("plane.normalization") == "solutions":
        marks = [(f"solution {i + 1}", x[i : i + 1], y[i : i + 1], colour(i)) for i in range(len(x))]
        return [Points(*mark) for mark in marks], ", and the dots mark the three solutions, which lie on the plane"
    path = x[inside], y[inside]
    series = Points("path", *path, PALETTE[-1], joined=True, legend=False, values=away[inside],
                    values_label="distance from the plane")  # fmt: skip
    outside = f", {np.sum(~inside)} of {len(x)} outside of the picture" if not inside.all() else ""
    return [series], (
        f"; the dots are the training path's nearest places on the plane{outside}, its points themselves lie up to "
        f"{away.max():.3g} away from it, so that their losses are not those drawn below them"
    )


def _common_range(planes: Sequence[np.ndarray]) -> tuple[float, float]:
    """The losses that are drawn: from the smallest to the largest, walls cut off."""
    losses = np.concatenate([plane.ravel() for plane in planes])
    finite = losses[np.isfinite(losses)]
    low, middle = float(finite.min()), float(np.median(finite))
    high = min(float(finite.max()), max(middle, CLIP_FACTOR * abs(middle)))
    return low, high if high > low else low + max(abs(low), 1.0)


def _plane_notes(run: Run, losses: np.ndarray, high: float) -> str:
    cut, holes = int(np.sum(losses > high)), int(np.isnan(losses).sum())
    stride = int(run.get("plane.stride") or 1)
    stopped = f"; it was stopped when one row and column in {stride} was known" if stride > 1 else ""
    clipped = f"; {cut} of {losses.size} values above {high:.3g} are drawn at {high:.3g}" if cut else ""
    return stopped + clipped + (f"; {holes} of {losses.size} points have no value and stay empty" if holes else "")


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
