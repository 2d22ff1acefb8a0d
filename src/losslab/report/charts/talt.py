"""Samples of TALT's -> charts: eigenvalues with their thresholds, valleys, bases, and the gradient on its way."""

from collections.abc import Iterator, Sequence

import numpy as np

from losslab.report.chart import PALETTE, Chart, Line, Panel, Points, Series, colour, spans_decades
from losslab.report.talt_rows import Watched

MOST = 6  # tensors that are drawn: as many as there are colours beside the grey
GREY = PALETTE[-1]
LOW, HIGH, MEDIAN = colour(0), colour(1), colour(2)
# Percentiles of the eigenvalues that are drawn, by their place among those of a sample.
DRAWN = {0: "smallest", 3: "20th percentile", 6: "median", 9: "80th percentile", 12: "largest"}


def charts(watched: Watched) -> list[Chart]:
    """All pictures that the samples allow, in the page's order."""
    names = watched.largest(MOST)
    drawn = (_eigenvalues, _valleys, _transformation, _stages, _bases, _stability)
    found = [draw(watched, names) for draw in drawn]
    return [chart for chart in found if chart.panels]


def _eigenvalues(watched: Watched, names: Sequence[str]) -> Chart:
    """A panel a tensor: percentiles of λ, and the thresholds between them."""
    panels = []
    for name in names:
        steps, values = watched.series(name, "eigenvalues")
        if not steps.size:
            continue
        series: list[Series] = [
            Line(words, steps, _positive(values[:, place]), MEDIAN if words == "median" else GREY, legend=False)
            for place, words in DRAWN.items()
        ]
        for key, words, shade in (("low", "valleys below", LOW), ("high", "high curvature above", HIGH)):
            at, cuts = watched.line(name, key)
            if np.isfinite(cuts).any():
                series.append(Line(words, at, _positive(cuts), shade, dashed=True))
        panels.append(Panel("step", "eigenvalue λ", series, title=name, log_y=True))
    caption = (
        "Eigenvalues of the gradient's covariance in units of the squared gradient: from below the smallest, the 20th "
        "percentile, the median in green, the 80th percentile and the largest. Between two refreshes the thresholds "
        f"stay while the eigenvalues go on.{_left_out(watched, names)}"
    )
    return Chart("talt-eigenvalues", "Eigenvalues and thresholds", caption, panels)


def _valleys(watched: Watched, names: Sequence[str]) -> Chart:
    panels = [
        *_panels(watched, names, {"valley_share": "directions in valleys (%)"}, scale=100.0),
        *_panels(watched, names, {"high_share": "directions of high curvature (%)"}, scale=100.0),
        *_panels(watched, names, {"amplification": "gain in valleys", "level": "mean λ over its largest so far"}),
    ]
    if panels:
        panels[-2] = _with_near(panels[-2], watched, names)
    caption = (
        "Valleys are directions whose λ is below the threshold. The gain is what they are amplified with on average; a "
        "grey marker is a sample at which the tensor was held to be near a minimum, and so amplified less."
    )
    return Chart("talt-valleys", "Valleys, and what is done in them", caption, panels)


def _with_near(panel: Panel, watched: Watched, names: Sequence[str]) -> Panel:
    """The gain, with a marker where a minimum was held to be near."""
    series = list(panel.series)
    for name in names:
        steps, near = watched.line(name, "near")
        _, gain = watched.line(name, "amplification")
        marked = (near > 0) & np.isfinite(gain)
        if marked.any():
            series.append(Points("near a minimum", steps[marked], gain[marked], GREY))
    return Panel(panel.x_label, panel.y_label, series, log_y=panel.log_y)


def _transformation(watched: Watched, names: Sequence[str]) -> Chart:
    """A panel a tensor: the size of the gradient's and the update's entries, over the rank of their eigenvalue."""
    panels = []
    kinds = (
        ("gradient", "gradient", HIGH, False),
        ("smoothed", "averaged", HIGH, True),
        ("update", "update", LOW, False),
    )
    for name in names:
        series: list[Series] = []
        for kind, words, shade, dashed in kinds:
            steps, values = watched.series(name, f"profile_{kind}")
            if not steps.size:
                continue
            last = values[-1] / (np.sqrt(np.mean(values[-1] ** 2)) or 1.0)
            rank = 100 * (np.arange(len(last)) + 0.5) / len(last)
            series.append(Line(words, rank, _positive(last), shade, dashed=dashed))
        if series:
            panels.append(Panel("rank of the eigenvalue (%), largest first", "|entry| / RMS", series, name, log_y=True))
    caption = (
        "At the last sample, in the eigenspace: each entry's size in groups of equal eigenvalue rank, over the root "
        "mean square of all. The gradient lies along few directions; the nearer the blue line is to a level one, the "
        "more alike all directions move, and where it rises to the right, valleys are amplified."
        f"{_left_out(watched, names)}"
    )
    return Chart("talt-transformation", "The gradient before and after", caption, panels)


def _stages(watched: Watched, names: Sequence[str]) -> Chart:
    labels = {
        "gradient_norm": "gradient ‖G‖",
        "smoothed_norm": "averaged ‖M̂‖",
        "normalized_norm": "normalised",
        "update_norm": "update ‖U‖",
        "signal": "signal: ‖M̂‖² / Σλ",
    }
    panels = list(_panels(watched, names, labels))
    spreads: list[Series] = [
        Line(f"{name}s", watched.steps, values, GREY, dashed=name == "update")
        for name, values in watched.spreads.items()
        if np.isfinite(values).any()
    ]
    if panels and spreads:
        panels.append(Panel("step", "largest / smallest RMS of a tensor", spreads, log_y=_log(spreads)))
    caption = (
        "The lengths of what becomes of a gradient on its way to the update. A signal of 1 says that gradients agree "
        "from step to step, one near zero that they are noise. The last panel is how far the tensors' scales lie apart."
    )
    return Chart("talt-stages", "From the gradient to the update", caption, panels)


def _bases(watched: Watched, names: Sequence[str]) -> Chart:
    labels = {
        "state_numbers": "numbers in the state",
        "refreshes": "bases so far",
        "early": "of them early",
        "staleness": "steps since the basis was made",
        "off_diagonal": "covariance off the diagonal",
    }
    caption = (
        "Bases follow a schedule, every step at first and seldom later; a trigger can bring one early. The share of "
        "the covariance off the diagonal says how far the basis that a step used is from the eigenvectors."
    )
    return Chart("talt-bases", "Memory, refreshes and staleness", caption, list(_panels(watched, names, labels)))


def _stability(watched: Watched, names: Sequence[str]) -> Chart:
    labels = {
        "rotation_left": "rotation, shorter side (°)",
        "rotation_right": "rotation, longer side (°)",
        "covariance_distance": "incremental − batch covariance",
        "condition": "largest / smallest λ",
        "consistency": "cosine with the update before",
        "alignment": "cosine with the gradient",
    }
    caption = (
        "How much the leading eigenvectors turned since the sample before (mean principal angle), how far the "
        "incremental covariance is from that of the last sampled gradients, and how alike are an update, the one of "
        "the sample before and the gradient."
    )
    panels = list(_panels(watched, names, labels))
    return Chart("talt-stability", "How steady eigenspaces and updates are", caption, panels)


def _panels(watched: Watched, names: Sequence[str], labels: dict[str, str], scale: float = 1.0) -> Iterator[Panel]:
    """A panel a number, with a line a tensor."""
    for key, label in labels.items():
        series: list[Series] = []
        for index, name in enumerate(names):
            steps, values = watched.line(name, key)
            if np.isfinite(values).any():
                series.append(Line(name, steps, scale * values, colour(index)))
        if series:
            yield Panel("step", label, series, log_y=_log(series))


def _log(series: Sequence[Series]) -> bool:
    return spans_decades(np.concatenate([line.y for line in series]))


def _positive(values: np.ndarray) -> np.ndarray:
    """For a log axis, which has no place for zero."""
    return np.where(values > 0, values, np.nan)


def _left_out(watched: Watched, names: Sequence[str]) -> str:
    count = len(watched.tensors)
    return f" Shown are the {len(names)} largest of {count} tensors." if len(names) < count else ""
