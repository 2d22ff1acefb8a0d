"""One kind of picture of a folder, without the whole page."""

from pathlib import Path

from losslab.report import matplotlib_backend
from losslab.report.chart import colour
from losslab.report.charts.common import Figures
from losslab.report.contents import read


def draw(folder: str | Path, figures: Figures) -> list[Path]:
    """Write a figure function's charts to the folder's `figures/`, as its report does; returns the files."""
    contents = read(folder)
    charts = figures(contents, {run.name: colour(index) for index, run in enumerate(contents.runs)})
    images = matplotlib_backend.save_all(charts, folder)
    return [images / f"{chart.name}.png" for chart in charts]
