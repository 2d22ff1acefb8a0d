"""Charts -> PNG files with matplotlib, without pyplot: no global state, no display."""

import io
import textwrap
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, NullLocator

from losslab.report.chart import (
    Chart,
    Contour,
    Landscape,
    Line,
    Panel,
    Points,
    Surface,
    log_ticks,
    tick_label,
)
from losslab.report.images import Image
from losslab.studies.record import write_atomically

DPI = 160
GREY = "#8C8C8C"
MIN_WIDTH = 7.2  # inches, which a title needs
TICK_INCHES = 0.065  # a character of a label beside an image
UPRIGHT = 5  # characters of the longest label that still lies below a tile
_X_TICKS, _Y_TICKS = attrgetter("x_ticks"), attrgetter("y_ticks")
BAND_OPACITY = 0.2
TITLE_CHARACTERS = 56  # in one line of seven inches
LEGEND_CHARACTERS = 90  # in one row below the panels


def figure(chart: Chart) -> Figure:
    """Draw a chart."""
    rows, columns = chart.grid
    widths, heights, size = _cells(chart)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns, width_ratios=widths, height_ratios=heights)
    title = textwrap.fill(chart.title, TITLE_CHARACTERS * int(size[0]) // 7)
    figure.suptitle(_text(title), fontsize=12, fontweight="bold")
    for index, panel in enumerate(chart.panels):
        solid = any(isinstance(series, Surface) for series in panel.series)
        axes = figure.add_subplot(grid[index // columns, index % columns], projection="3d" if solid else None)
        for series in panel.series:
            if isinstance(series, Surface):
                _surface(axes, series)
            elif isinstance(series, Contour):
                _contour(figure, axes, series)
            elif isinstance(series, Points):
                _points(axes, series)
                _values(figure, axes, series)
            elif isinstance(series, Image):
                _image(figure, axes, series)
            else:
                _line(axes, series, panel)
        _axes(axes, panel)
    _legend(figure)
    return figure


def save_all(charts: Iterable[Chart], folder: str | Path) -> Path:
    """Write each chart's `figures/<name>.png` in a folder; where the pictures are."""
    images = Path(folder) / "figures"
    images.mkdir(exist_ok=True)
    for chart in charts:
        save(chart, images / f"{chart.name}.png")
    return images


def save(chart: Chart, path: Path) -> None:
    """Write a chart as a PNG file, whole or not at all."""
    buffer = io.BytesIO()
    figure(chart).savefig(buffer, format="png", dpi=DPI)
    write_atomically(path, buffer.getvalue())


def _cells(chart: Chart) -> tuple[list[float], list[float], tuple[float, float]]:
    """The widths of the columns and the heights of the rows, in inches, and those of the whole figure."""
    rows, columns = chart.grid
    if chart.is_landscape:
        return [5.8] * columns, [4.7] * rows, (5.8 * columns, 4.7 * rows)
    if not chart.is_still:
        return [4.4] * columns, [3.8] * rows, (max(MIN_WIDTH, 4.4 * columns), 3.8 * rows + 0.6)
    cells, labels = np.zeros((rows * columns, 2)), np.zeros((rows * columns, 2))
    for index, panel in enumerate(chart.panels):
        images = [series for series in panel.series if isinstance(series, Image)]
        cells[index] = images[-1].x[-1], images[-1].y[-1]
        longest = [max(len(line) for i in images for t in ("", *ticks(i)[1]) for line in t.splitlines() or [""])
                   for ticks in (_Y_TICKS, _X_TICKS)]  # fmt: skip
        labels[index] = TICK_INCHES * np.array(longest) + (1.5 if images[-1].bar else 0.3, 0.5)
    widths, heights = cells[:, 0].reshape(rows, columns).max(0), cells[:, 1].reshape(rows, columns).max(1)
    beside = labels[:, 0].reshape(rows, columns).max(0).sum(), labels[:, 1].reshape(rows, columns).max(1).sum()
    size = max(MIN_WIDTH, widths.sum() + beside[0]), heights.sum() + beside[1] + 0.6
    return widths.tolist(), heights.tolist(), size


def _line(axes: Any, line: Line, panel: Panel) -> None:
    style = "o" if len(line.x) == 1 else "--" if line.dashed else "-"
    axes.plot(line.x, line.y, style, color=line.colour, label=_text(line.name) if line.legend else None, lw=1.6)
    if line.error is not None:
        floor = panel.y_range[0] if panel.log_y and panel.y_range else -np.inf
        lower = np.maximum(line.y - line.error, floor)
        axes.fill_between(line.x, lower, line.y + line.error, color=line.colour, alpha=BAND_OPACITY, lw=0)


def _points(axes: Any, points: Points) -> None:
    style = "o-" if points.joined else "o"
    label = _text(points.name) if points.legend else None
    axes.errorbar(
        points.x,
        points.y,
        yerr=points.error,
        fmt=style,
        color=points.colour,
        label=label,
        ms=5,
        lw=1.2,
        capsize=0,
    )


def _values(figure: Figure, axes: Any, points: Points) -> None:
    """The markers' colours, with a scale of their own below."""
    if points.values is not None:
        style = {"cmap": "autumn_r", "edgecolors": "black", "linewidths": 0.5}
        drawn = axes.scatter(points.x, points.y, c=points.values, s=26, zorder=3, **style)
        figure.colorbar(drawn, ax=axes, label=points.values_label, location="bottom", shrink=0.7, aspect=40)


def _surface(axes: Any, surface: Surface) -> None:
    heights, levels = surface.heights(), surface.levels()
    alphas, betas = np.meshgrid(surface.x, surface.y)
    scale = {"cmap": "viridis", "vmin": levels[0], "vmax": levels[-1]}
    floor = levels[0] - 0.25 * (levels[-1] - levels[0])
    axes.plot_surface(alphas, betas, heights, rstride=1, cstride=1, alpha=0.92, linewidth=0, antialiased=True, **scale)
    axes.contour(alphas, betas, heights, levels=levels, zdir="z", offset=floor, linewidths=0.9, **scale)
    axes.set_zlim(floor, levels[-1])
    places, labels = surface.ticks()
    axes.set_zticks(places, labels)
    axes.set_zlabel("loss", labelpad=6)
    axes.view_init(elev=28, azim=-58)
    axes.set_box_aspect((1, 1, 0.72), zoom=0.92)
    axes.tick_params(labelsize=8)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.pane.set_alpha(0.4)


def _contour(figure: Figure, axes: Any, contour: Contour) -> None:
    heights, levels = contour.heights(), contour.levels()
    filled = axes.contourf(contour.x, contour.y, heights, levels=levels, cmap="viridis", extend="both")
    axes.contour(contour.x, contour.y, heights, levels=levels, colors="white", linewidths=0.5, linestyles="solid")
    axes.plot([0], [0], "x", color="white", ms=9, mew=2)
    axes.set_aspect("equal")
    axes.set_facecolor("#E4E4E4")  # holes
    places, labels = contour.ticks()
    bar = figure.colorbar(filled, ax=axes, label="loss", shrink=0.9, extendfrac=0)
    bar.set_ticks(list(places), labels=labels)
    bar.outline.set_visible(False)


def _image(figure: Figure, axes: Any, image: Image) -> None:
    scale = {"cmap": image.colours, "vmin": image.low, "vmax": image.high}
    drawn = axes.pcolormesh(image.x, image.y, np.ma.masked_invalid(image.z), **scale)
    if image.bar:
        bar = figure.colorbar(drawn, ax=axes, label=image.bar, shrink=0.8, aspect=30)
        bar.outline.set_visible(False)


def _image_axes(axes: Any, images: Sequence[Image]) -> None:
    """As large as printed, downwards, with all the images' labels; long ones upright."""
    axes.set_aspect("equal", anchor="NW")  # what a colour bar takes away moves nothing
    axes.set_xlim(0, images[-1].x[-1])
    axes.set_ylim(images[-1].y[-1], 0)
    for ticks, write in ((_X_TICKS, axes.set_xticks), (_Y_TICKS, axes.set_yticks)):
        places = [place for image in images for place in ticks(image)[0]]
        texts = [_text(text) for image in images for text in ticks(image)[1]]
        upright = ticks is _X_TICKS and any(len(text) > UPRIGHT for text in texts)
        write(places, texts, fontsize=7.5, rotation=90 if upright else 0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _axes(axes: Any, panel: Panel) -> None:
    solid = any(isinstance(series, Surface) for series in panel.series)
    axes.set_xlabel(_short(panel.x_label) if solid else panel.x_label)
    axes.set_ylabel(_short(panel.y_label) if solid else panel.y_label)
    if panel.title:
        axes.set_title(_text(panel.title), fontsize=10)
    if panel.log_y and (ends := panel.log_range()) is not None:
        ticks = log_ticks(*ends)
        axes.set_yscale("log")
        axes.set_yticks(ticks, [tick_label(tick) for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(*ends)
    elif panel.y_range is not None:
        axes.set_ylim(*panel.y_range)
    if any(isinstance(series, Landscape) for series in panel.series):
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if panel.x_step is not None:
        axes.xaxis.set_major_locator(MultipleLocator(panel.x_step))
    for guide in panel.guides:
        axes.axvline(guide, color=GREY, lw=0.9, ls=":", zorder=0)
    if images := [series for series in panel.series if isinstance(series, Image)]:
        _image_axes(axes, images)
    elif not any(isinstance(series, Landscape) for series in panel.series):
        axes.grid(visible=True, color="#E6E6E6", lw=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if any(isinstance(series, Points) and series.x.dtype.kind == "U" for series in panel.series):
        axes.margins(x=0.25)


def _legend(figure: Figure) -> None:
    """One legend below all panels, an entry for each name."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = max(1, min(len(entries), LEGEND_CHARACTERS // (max(map(len, entries)) + 6)))
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, frameon=False)


def _short(label: str) -> str:
    """The symbol alone, for the crowded axes of a surface."""
    return label.rpartition(" ")[2]


def _text(text: str) -> str:
    r"""Names are not formulas: matplotlib would set what stands between two $ as mathematics."""
    return text.replace("$", r"\$")
