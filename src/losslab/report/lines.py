"""The straight line between two solutions as a picture beside the first one's own records."""

from pathlib import Path

from losslab.report import matplotlib_backend
from losslab.report.chart import colour
from losslab.report.charts.interpolation import interpolation
from losslab.report.contents import Contents, read


def line_pictures(study: str | Path) -> list[Path]:
    """Write `<first>/probes/interp_<first>_to_<second>.png` for each straight line of a study; returns the paths."""
    found = read(study)
    colours = {run.name: colour(index) for index, run in enumerate(found.runs)}
    paths = []
    for pair in found.pairs:
        for chart in interpolation(Contents(found.name, found.runs, [pair], is_study=True), colours):
            path = Path(study) / pair.first / "probes" / f"interp_{pair.first}_to_{pair.second}.png"
            matplotlib_backend.save(chart, path)
            paths.append(path)
    return paths
