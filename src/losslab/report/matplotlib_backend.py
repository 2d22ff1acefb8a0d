"""Charts -> PNG files with matplotlib, without pyplot: no global state, no display."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter
from mpl_toolkits.mplot3d.axes3d import Axes3D

from losslab.report.chart import Chart, Contour, Landscape, Line, Panel, Points, Surface
from losslab.studies.record import write_atomically

DPI = 160
GREY = "#8C8C8C"
STYLE = {"family": "DejaVu Sans", "size": 10}


def figure(chart: Chart) -> Figure:
    """Draw a chart."""
    rows, columns = chart.grid
    size = (5.6, 4.4) if chart.is_landscape else (max(7.0, 4.6 * columns), 3.9 * rows + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    for index, panel in enumerate(chart.panels):
        axes = figure.add_subplot(rows, columns, index + 1, projection="3d" if chart.is_solid else None)
        for series in panel.series:
            _draw(axes, series, panel)
        _finish(axes, panel)
    _legend(figure, chart)
    figure.suptitle(_text(chart.title), fontsize=12, fontweight="bold", x=0.02, ha="left")
    return figure
