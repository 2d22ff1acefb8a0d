"""The page of a comparison: verdict, table, pictures, from its folder alone."""

import json
from pathlib import Path

from losslab.report import comparison_table, matplotlib_backend
from losslab.report.charts.comparison import charts as charts_of
from losslab.report.comparison import Compared, read
from losslab.report.page import drawings, flat, template
from losslab.studies.record import write_atomically


def build(folder: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into the folder of a comparison, finished or stopped.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: If the folder holds no comparison.
    """
    compared = read(folder)
    charts = charts_of(compared)
    images = matplotlib_backend.save_all(charts, folder)
    comparison = compared.comparison
    columns = comparison_table.LINES
    page = template("comparison.html.j2").render(
        contents=compared,
        started=comparison.machine,
        summary=" ".join(comparison.verdicts),
        comparison=comparison,
        protocol=protocol(compared),
        rows=[(line, [line.cell(comparison, each) for each in comparison.contenders]) for line in columns],
        columns=columns,
        pairs=[(pair, comparison_table.pair_cells(comparison, pair)) for pair in comparison.pairs],
        remarks=comparison_table.remarks(comparison),
        drawings=drawings(charts, images),
        environment=[(key.replace("_", " "), text) for key, text in flat(compared.environment).items()],
        configurations=[("plan", json.dumps(compared.plan, indent=2, ensure_ascii=False))],
    )
    path = Path(folder) / "report.html"
    write_atomically(path, page.encode())
    return path


def protocol(compared: Compared) -> str:
    """How the numbers came about, in one sentence."""
    comparison = compared.comparison
    seeds = ", ".join(map(str, comparison.seeds))
    return (
        f"{comparison.trials} trials of tuning each, on the validation split with seed {comparison.tuning_seed}; then "
        f"the seeds {seeds}; the target is {comparison_table.goal(comparison)}, within {comparison.horizon} steps."
    )
