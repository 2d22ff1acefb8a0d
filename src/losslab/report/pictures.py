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
    target = Path(folder) / "figures"
    target.mkdir(exist_ok=True)
    paths = [target / f"{chart.name}.png" for chart in charts]
    for chart, path in zip(charts, paths, strict=True):
        matplotlib_backend.save(chart, path)
    return paths
