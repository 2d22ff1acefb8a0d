"""One self-contained HTML page from a folder alone, plotly.js inside it, PNGs of its figures beside it."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from losslab.report import matplotlib_backend, plotly_backend, seeds
from losslab.report.chart import Chart
from losslab.report.charts import charts as charts_of
from losslab.report.contents import PROBES, Contents, Pair, Run, read
from losslab.report.table import ABSENT, COLUMNS, Cell, number, percent
from losslab.status import Status
from losslab.studies.batch_file import together
from losslab.studies.record import write_atomically

MANY = 6  # runs: of more, sentences give the number in place of the names
MAX_SOLID = 6  # browsers keep about 16 WebGL contexts, of which plotly takes up to two for each surface


@dataclass(frozen=True)
class Drawing:
    """A chart as the page shows it: interactive from `figure`, or still from `image`, a data URI."""

    chart: Chart
    figure: dict[str, Any]
    image: str = ""


def build(folder: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into a run folder or a study folder.

    Needs neither torch nor the network, and reports what there is: the page names what an interrupted run
    never wrote.

    Args:
        folder: A run folder, or a study folder with several.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: If the folder holds no run.
    """
    contents = read(folder)
    charts = charts_of(contents)
    images = matplotlib_backend.save_all(charts, folder)
    path = Path(folder) / "report.html"
    write_atomically(path, render(contents, charts, images).encode())
    return path


def render(contents: Contents, charts: list[Chart], images: Path) -> str:
    """The page's HTML.

    Args:
        contents: What the folder holds.
        charts: The pictures, in order.
        images: The folder of their PNGs.
    """
    rows = [(run.name, [column.cell(run) for column in COLUMNS]) for run in contents.runs]
    return template("report.html.j2").render(
        contents=contents,
        started=started(contents.runs),
        summary=summary(contents),
        columns=COLUMNS,
        rows=rows,
        seeds=seeds,
        over_seeds=seeds.rows(contents.runs) if have_seeds(contents.runs) else [],
        remarks=remarks(rows),
        absent=absent(contents),
        barriers=[(pair, barrier_cells(pair)) for pair in interpolated(contents)],
        drawings=drawings(charts, images),
        environment=environment(contents.runs),
        configurations=[(run.name, json.dumps(run.config, indent=2, ensure_ascii=False)) for run in contents.runs],
    )


def template(name: str) -> jinja2.Template:
    """A page's template, with plotly.js for its pictures."""
    loader = jinja2.PackageLoader("losslab.report")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(name, globals={"plotly_js": Markup(get_plotlyjs())})


def started(runs: list[Run]) -> str:
    """When the first run began, in words; empty if no run says so."""
    times = sorted(str(run.environment["started"]) for run in runs if run.environment.get("started"))
    if not times:
        return ""
    try:
        moment = datetime.fromisoformat(times[0].replace("Z", "+00:00"))
    except ValueError:
        return times[0]
    return f"{moment.day} {moment:%B %Y, %H:%M} {moment.tzname() or ''}".strip()


def summary(contents: Contents) -> str:
    """The outcome in a few plain words, from whatever was measured."""
    parts = [_reached(contents.runs), _curvature(contents.runs), _highest_barrier(contents.pairs)]
    return "; ".join(part for part in parts if part) + "."


def _reached(runs: list[Run]) -> str:
    finals = {run.name: run.final for run in runs if run.final and run.final.get("test_accuracy") is not None}
    opening = f"{len(runs)} runs" if len(runs) > 1 else f"One run, {runs[0].name}"
    if not finals:
        return f"{opening}, not trained to the end yet"
    if have_seeds(runs):
        groups = together(run for run in runs if run.name in finals)
        accuracies = {name: seeds.finals(group, "test_accuracy") for name, group in groups.items()}
        name = max(accuracies, key=lambda name: float(np.mean(accuracies[name])))
        return (
            f"{opening}; over its seeds {name} has the best mean test accuracy, {seeds.mean_accuracy(accuracies[name])}"
        )
    best = max(finals, key=lambda name: finals[name]["test_accuracy"])
    accuracy = percent(finals[best]["test_accuracy"])
    if len(runs) == 1:
        return f"{opening}, with {accuracy} test accuracy"
    return f"{opening}; {best} reached the best test accuracy, {accuracy}"


def _curvature(runs: list[Run]) -> str:
    found = ((run.name, run.get("spectrum.top")) for run in runs)
    tops = {name: float(top[0]) for name, top in found if top is not None and len(top)}
    if len(tops) < 2:
        return "".join(f"its largest Hessian eigenvalue is {number(top, 3)}" for top in tops.values() if len(runs) == 1)
    low, high = min(tops, key=lambda name: tops[name]), max(tops, key=lambda name: tops[name])
    return (
        f"by the largest Hessian eigenvalue {low} ended in the flattest place ({number(tops[low], 3)}) "
        f"and {high} in the sharpest ({number(tops[high], 3)})"
    )


def _highest_barrier(pairs: list[Pair]) -> str:
    known = [pair for pair in pairs if isinstance(pair.get("interpolation.barrier"), int | float)]
    if not known:
        return ""
    highest = max(known, key=lambda pair: pair.get("interpolation.barrier"))
    if highest.get("interpolation.barrier") <= 0:
        return "no straight line between two solutions has a barrier"
    height = number(highest.get("interpolation.barrier"), 3)
    return f"the highest barrier on a straight line, {height}, lies between {highest.first} and {highest.second}"


def have_seeds(runs: Sequence[Run]) -> bool:
    """Whether some of the runs differ in their seed alone."""
    return len(together(runs)) < len(runs)


def remarks(rows: list[tuple[str, list[Cell]]]) -> list[str]:
    """One sentence for each number that is not to be taken at its word; equal reasons of a run share one."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, cells in rows:
        for column, cell in zip(COLUMNS, cells, strict=True):
            if cell.suspect:
                found.setdefault((name, cell.reason), []).append(column.title)
    alike: dict[tuple[str, str], list[str]] = {}
    for (name, reason), titles in found.items():
        alike.setdefault((", ".join(titles), reason), []).append(name)
    return [f"{_named(names)}, {titles}: {reason}." for (titles, reason), names in alike.items()]


def _named(runs: Sequence[str]) -> str:
    return ", ".join(runs) if len(runs) <= MANY else f"{len(runs)} runs"


def absent(contents: Contents) -> list[str]:
    """One sentence for each part that the folder lacks."""
    lacking = {
        "training curves": [run.name for run in contents.runs if not run.epochs],
        "test accuracy": [run.name for run in contents.runs if run.final is None],
    }
    lacking |= {probe: [run.name for run in contents.runs if probe not in run.probes] for probe in PROBES}
    sentences = [f"No {part} in the folder for {_named(runs)}." for part, runs in lacking.items() if runs]
    pairs = len(contents.runs) * (len(contents.runs) - 1) // 2
    expected = contents.pairs or len(contents.runs) <= MANY  # a batch's runs are no solutions to be joined
    if contents.is_study and expected and len(interpolated(contents)) < pairs:
        sentences.append(f"{len(interpolated(contents))} of {pairs} pairs of runs were interpolated.")
    return sentences


def interpolated(contents: Contents) -> list[Pair]:
    """The pairs of runs with a straight line between them."""
    return [pair for pair in contents.pairs if "interpolation" in pair.probes]


def barrier_cells(pair: Pair) -> list[Cell]:
    """Barrier, losses at both ends, distance and status of one straight line."""
    name = pair.get("interpolation.status")
    status = Status(name) if name in Status.__members__ else Status.converged
    values = [pair.get(f"interpolation.{key}") for key in ("barrier", "loss_a", "loss_b", "distance")]
    reason = "" if status.ok else status.message
    cells = [Cell(number(value), reason=reason) for value in values]
    return [*cells, Cell(str(name or ABSENT).replace("_", " "), reason=reason)]


def environment(runs: list[Run]) -> list[tuple[str, str]]:
    """Each entry of the runs' environments; where the runs differ, each run's."""
    each_run = {run.name: flat(run.environment) for run in runs}
    keys = dict.fromkeys(key for entries in each_run.values() for key in entries)
    lines = []
    for key in keys:
        values = {name: entries[key] for name, entries in each_run.items() if key in entries}
        same = len(set(values.values())) == 1
        each = ", ".join(f"{name}: {value}" for name, value in values.items())
        text = next(iter(values.values())) if same else each
        lines.append((key.replace("_", " "), text))
    return lines


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The entries of a tree under dotted names, in words."""
    entries: dict[str, str] = {}
    for key, value in tree.items():
        entries |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: _word(value)}
    return entries


def _word(value: Any) -> str:
    return ABSENT if value is None else str(value)


def drawings(charts: list[Chart], images: Path) -> list[Drawing]:
    """The charts as the page shows them; those that a browser could not carry as images."""
    solid = [chart.name for chart in charts if chart.is_solid][:MAX_SOLID]
    found = []
    for chart in charts:
        if chart.is_still or (chart.is_solid and chart.name not in solid):
            picture = base64.b64encode((images / f"{chart.name}.png").read_bytes()).decode()
            found.append(Drawing(chart, {}, image=f"data:image/png;base64,{picture}"))
        else:
            found.append(Drawing(chart, json.loads(plotly_backend.figure(chart).to_json())))
    return found
