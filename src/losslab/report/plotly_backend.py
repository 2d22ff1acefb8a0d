"""Charts -> interactive plotly figures. Paper, text and grid are coloured by the page, in two themes."""

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from losslab.report.chart import (
    Chart,
    Contour,
    Landscape,
    Line,
    Panel,
    Points,
    Series,
    Surface,
    log_ticks,
    tick_label,
)

PANEL_HEIGHT = 380
LANDSCAPE_HEIGHT = 460
BAND_OPACITY = 0.18


def figure(chart: Chart) -> go.Figure:
    """Draw a chart; it fills its container's width."""
    rows, columns = chart.grid
    figure = make_subplots(
        rows=rows,
        cols=columns,
        specs=_specs(chart),
        subplot_titles=[_text(panel.title) for panel in chart.panels],
        horizontal_spacing=0.24 / columns if columns > 1 else 0,
        vertical_spacing=0.25 / rows,
    )
    named: set[str] = set()
    for index, panel in enumerate(chart.panels):
        place = {"row": index // columns + 1, "col": index % columns + 1}
        for series in panel.series:
            for trace in _traces(series, panel):
                if trace.showlegend and trace.name in named:  # one entry for a run in all panels
                    trace.showlegend = False
                named |= {trace.name} if trace.showlegend else set()
                figure.add_trace(trace, **place)
        if chart.is_solid:
            _solid_axes(figure, panel, panel.series[0])
        else:
            _axes(figure, panel, place)
    _layout(figure, chart)
    return figure


def _specs(chart: Chart) -> list[list[dict[str, str] | None]]:
    rows, columns = chart.grid
    kind = "scene" if chart.is_solid else "xy"
    cells: list[dict[str, str] | None] = [{"type": kind} for _ in chart.panels]
    cells += [None] * (rows * columns - len(cells))
    return [cells[row * columns : (row + 1) * columns] for row in range(rows)]


def _traces(series: Series, panel: Panel) -> list[Any]:
    if isinstance(series, Surface):
        return [_surface(series)]
    if isinstance(series, Contour):
        return [_contour(series), _origin()]
    if isinstance(series, Points):
        return [_points(series)]
    assert isinstance(series, Line)  # a page shows images as files
    return ([] if series.error is None else [_band(series, panel)]) + [_line(series)]


def _line(line: Line) -> go.Scatter:
    style = {"color": line.colour, "width": 2, "dash": "dash" if line.dashed else "solid"}
    name = _text(line.name)
    mode = "lines" if len(line.x) > 1 else "markers"
    return go.Scatter(x=line.x, y=line.y, mode=mode, name=name, legendgroup=name, showlegend=line.legend, line=style)


def _band(line: Line, panel: Panel) -> go.Scatter:
    assert line.error is not None
    upper, lower = line.y + line.error, line.y - line.error
    if panel.log_y:  # a log axis has no place for zero
        floor = panel.y_range[0] if panel.y_range else float(np.nanmin(line.y[line.y > 0]))
        upper, lower = np.maximum(upper, floor), np.maximum(lower, floor)
    name = _text(line.name)
    return go.Scatter(
        x=np.concatenate([line.x, line.x[::-1]]),
        y=np.concatenate([upper, lower[::-1]]),
        fill="toself",
        mode="lines",
        line={"width": 0, "color": line.colour},
        fillcolor=line.colour,
        opacity=BAND_OPACITY,
        hoverinfo="skip",
        name=name,
        legendgroup=name,
        showlegend=False,
    )


def _points(points: Points) -> go.Scatter:
    name = _text(points.name)
    return go.Scatter(
        x=points.x,
        y=points.y,
        error_y=None if points.error is None else {"array": points.error, "thickness": 1.5, "width": 0},
        mode="lines+markers" if points.joined else "markers",
        name=name,
        legendgroup=name,
        showlegend=points.legend,
        marker=_marker(points),
        line={"color": points.colour, "width": 1.5},
    )


def _marker(points: Points) -> dict[str, Any]:
    if points.values is None:
        return {"color": points.colour, "size": 8}
    bar = {"title": {"text": _text(points.values_label)}, "orientation": "h", "y": -0.32, "thickness": 10, "len": 0.7}
    edge = {"color": "black", "width": 0.5}
    return {"color": points.values, "size": 8, "colorscale": "YlOrRd", "showscale": True, "colorbar": bar, "line": edge}


def _surface(surface: Surface) -> go.Surface:
    levels = surface.levels()
    lines = {"show": True, "start": levels[0], "end": levels[-1], "size": levels[1] - levels[0]}
    return go.Surface(
        **_colours(surface),
        z=surface.heights(),
        contours_z=lines | {"width": 1, "color": "#9A9A9A", "project": {"z": True}, "usecolormap": False},
        showlegend=False,
        name="loss",
        hoverinfo="text",  # a template would take the text of the transposed place
        text=_hover(surface),
    )


def _contour(contour: Contour) -> go.Contour:
    levels = contour.levels()
    return go.Contour(
        **_colours(contour),
        z=contour.heights(),
        contours={"start": levels[0], "end": levels[-1], "size": levels[1] - levels[0]},
        line={"width": 0.6, "color": "rgba(255,255,255,0.7)"},
        zmin=levels[0],
        zmax=levels[-1],
        connectgaps=False,
        showlegend=False,
        name="loss",
        hoverinfo="text",
        text=_hover(contour),
    )


def _colours(landscape: Landscape) -> dict[str, Any]:
    places, labels = landscape.ticks()
    levels = landscape.levels()
    bar: dict[str, Any] = {"title": {"text": "loss"}, "thickness": 12, "len": 0.8, "outlinewidth": 0}
    bar |= {"tickvals": places, "ticktext": labels}
    scale = {"colorscale": "Viridis", "colorbar": bar, "x": landscape.x, "y": landscape.y}
    return scale | ({"cmin": levels[0], "cmax": levels[-1]} if isinstance(landscape, Surface) else {})


def _hover(landscape: Landscape) -> np.ndarray:
    """The losses themselves, also where they are drawn clipped or on a log axis."""
    return np.array(
        [
            [f"α {x:.3g}<br>β {y:.3g}<br>loss {loss:.4g}" for x, loss in zip(landscape.x, row, strict=True)]
            for y, row in zip(landscape.y, landscape.z, strict=True)
        ]
    )


def _origin() -> go.Scatter:
    marker = {"symbol": "x-thin", "size": 12, "line": {"width": 2.5, "color": "white"}}
    return go.Scatter(x=[0], y=[0], mode="markers", marker=marker, name="solution", showlegend=False)


def _axes(figure: go.Figure, panel: Panel, place: dict[str, int]) -> None:
    for update, label in ((figure.update_xaxes, panel.x_label), (figure.update_yaxes, panel.y_label)):
        title = {"text": _text(label), "standoff": 8, "font": {"size": 13}}
        update(title=title, tickfont={"size": 12}, **place)
    if panel.x_step is not None:
        figure.update_xaxes(dtick=panel.x_step, tick0=0, **place)
    if any(isinstance(series, Points) and series.x.dtype.kind == "U" for series in panel.series):
        names = {name for series in panel.series if isinstance(series, Points) for name in series.x}
        figure.update_xaxes(range=[-0.3, len(names) - 0.7], **place)
    if panel.log_y and (ends := panel.log_range()) is not None:
        ticks = log_ticks(*ends)
        figure.update_yaxes(type="log", range=np.log10(ends).tolist(), **place)
        figure.update_yaxes(tickvals=ticks, ticktext=[tick_label(tick) for tick in ticks], **place)
    elif panel.y_range is not None:
        figure.update_yaxes(range=panel.y_range, **place)
    if any(isinstance(series, Landscape) for series in panel.series):
        figure.update_xaxes(constrain="domain", **place)
        figure.update_yaxes(scaleanchor="x", constrain="domain", **place)
    for guide in panel.guides:
        figure.add_vline(x=guide, line={"width": 1, "dash": "dot", "color": "#8C8C8C"}, **place)


def _solid_axes(figure: go.Figure, panel: Panel, landscape: Series) -> None:
    assert isinstance(landscape, Surface)
    places, labels = landscape.ticks()
    levels = landscape.levels()
    ends = [landscape.x, landscape.y, levels]
    x_range, y_range, z_range = ([float(values[0]), float(values[-1])] for values in ends)
    figure.update_scenes(
        xaxis={"title": panel.x_label.rpartition(" ")[2], "range": x_range},
        yaxis={"title": panel.y_label.rpartition(" ")[2], "range": y_range},
        zaxis={"title": "", "tickvals": places, "ticktext": labels, "range": z_range},
        camera={"eye": {"x": 1.45, "y": -1.6, "z": 1.0}, "center": {"x": 0, "y": 0, "z": -0.15}},
        aspectratio={"x": 1, "y": 1, "z": 0.75},
    )


def _layout(figure: go.Figure, chart: Chart) -> None:
    rows, _ = chart.grid
    figure.update_layout(
        template="none",
        height=LANDSCAPE_HEIGHT if chart.is_landscape else PANEL_HEIGHT * rows + 40,
        margin={"l": 64, "r": 24, "t": 36, "b": 56} if not chart.is_solid else {"l": 0, "r": 0, "t": 8, "b": 8},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
        hovermode="closest",
        font={"size": 13},
    )


def _text(text: str) -> str:
    """Plotly reads labels as a kind of HTML: names are not to be tags."""
    return html.escape(text, quote=False)
