"""The loss along eigenvectors and random directions, with its quadratic model."""

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, colour
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Run


def perturbation(contents: Contents, colours: Colours) -> list[Chart]:
    """Two panels a run, eigenvectors and random directions: losses as markers, the quadratic models dashed."""
    panels = [panel for run in contents.runs for panel in _panels(run)]
    if not panels:
        return []
    caption = (
        "Markers are the loss at a distance ε from the solution along one direction, dashed lines its quadratic model "
        "with the true slope and curvature λ: as long as the markers lie on their line, the Hessian tells the truth, "
        "and the title says up to which ε that is along the first direction."
    )
    return [Chart("perturbation", "How far the quadratic model holds", caption, panels)]


def _panels(run: Run) -> list[Panel]:
    losses, names = run.array("perturbation.losses"), list(run.get("perturbation.directions") or ())
    if not losses.size or not np.isfinite(losses).any():
        return []
    random = [number for number, name in enumerate(names) if name.startswith("random")]
    along = [number for number in range(len(names)) if number not in random]
    return [_panel(run, names, chosen) for chosen in (along, random) if chosen]


def _panel(run: Run, names: list[str], chosen: list[int]) -> Panel:
    epsilons, losses = run.array("perturbation.epsilons"), run.array("perturbation.losses")
    slopes, curvatures, reach = (run.array(f"perturbation.{name}") for name in ("slopes", "curvatures", "valid_to"))
    centre, fine = float(losses[0][epsilons == 0][0]), np.linspace(epsilons[0], epsilons[-1], 101)
    finite = losses[chosen][np.isfinite(losses[chosen])]
    span = np.ptp(finite) if finite.size else 0.0
    highest = finite.max(initial=centre) + 0.08 * span  # a sharp direction's model may rise far above
    series: list[Series] = []
    for number in chosen:
        series.append(Points(names[number], epsilons, losses[number], colour(number)))
        model = centre + slopes[number] * fine + 0.5 * curvatures[number] * fine**2
        model[model > highest] = np.nan
        series.append(Line(f"{names[number]}, model", fine, model, colour(number), dashed=True, legend=False))
    first = chosen[0]
    where = f"holds to ε = {reach[first]:.2g}" if reach[first] else "ends before the first point"
    title = f"{run.name}: λ = {curvatures[first]:.3g} {where}"
    return Panel("distance ε", "loss", series, title=title, guides=(0.0,))
