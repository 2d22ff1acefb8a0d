"""The pictures of a study: how it went, which parameters mattered, where the good values lie."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Points, Series, colour, spans_decades
from losslab.studies.tuning.result import Trial, Tuned

WHOLE, BEST, PRUNED = colour(0), colour(1), "#8C8C8C"


def charts(tuned: Tuned) -> list[Chart]:
    """All pictures that the record allows, in the page's order."""
    drawn = (_history(tuned), _importances(tuned), _parameters(tuned))
    return [chart for chart in drawn if chart is not None]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted name, where that tells them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def _history(tuned: Tuned) -> Chart | None:
    """Each trial's value, and the best so far."""
    series = _by_status(tuned, tuned.trials, [trial.number for trial in tuned.trials])
    whole = [trial for trial in tuned.trials if trial.status == "complete"]
    if not series:
        return None
    if whole:
        best = np.maximum.accumulate if _large(tuned) else np.minimum.accumulate
        numbers = [trial.number for trial in whole] + [tuned.trials[-1].number]
        stairs = np.repeat(best(_values(tuned, whole)), 2)
        series.insert(0, Line("best so far", np.repeat(np.array(numbers, dtype=float), 2)[1:-1], stairs, BEST))
    lost = [float(trial.number) for trial in tuned.trials if trial.status == "diverged"]
    panel = Panel("trial", _label(tuned), series, log_y=_log(tuned), guides=lost)
    caption = (
        "A trial's value is the metric at its last evaluation: for pruned trials, in grey, the one at which they were "
        "ended. Dotted lines are trials that diverged."
    )
    return Chart("trials", "The trials", caption, [panel])


def _importances(tuned: Tuned) -> Chart | None:
    """The share of each parameter."""
    if not tuned.importances:
        return None
    names = short_names(list(tuned.space))
    series: list[Series] = []
    for key, share in tuned.importances.items():
        place, ends = np.array([names[key]] * 2), np.array([0.0, 100 * share])
        series.append(Line(key, place, ends, WHOLE, legend=False))
        series.append(Points(key, place[:1], ends[1:], WHOLE, legend=False))
    caption = (
        f"How much of the trials' order each parameter alone explains (fANOVA), from {len(tuned.trials)} trials; what "
        "is explained only by several together is left out, and few trials make this a guess."
    )
    panel = Panel("", "importance (%)", series)
    return Chart("importances", "Which parameters mattered", caption, [panel])


def _parameters(tuned: Tuned) -> Chart | None:
    """The value against each parameter."""
    names = short_names(list(tuned.space))
    panels = []
    for key, entry in tuned.space.items():
        places = [_place(entry, trial.parameters[key]) for trial in tuned.trials]
        series = _by_status(tuned, tuned.trials, places)
        if not series:
            return None
        if "choices" in entry:  # in their own order, those not tried included
            texts = np.array([_text(value) for value in entry["choices"]])
            series.insert(0, Line("choices", texts, np.full(len(texts), np.nan), PRUNED, legend=False))
        label = f"log₁₀ of {names[key]}" if entry.get("log") else names[key]
        ends = [] if "choices" in entry else [_place(entry, entry[end]) for end in ("low", "high")]
        panels.append(Panel(label, _label(tuned), series, log_y=_log(tuned), guides=ends))
    caption = (
        "Every trial against each of its values. Dotted lines are the ends of the range: a best value at one of them "
        "says that it should be wider. Grey trials were ended early, so they look worse than they are."
    )
    return Chart("parameters", "Where the good values lie", caption, panels, columns=3)


def _by_status(tuned: Tuned, trials: Sequence[Trial], places: Sequence[Any]) -> list[Series]:
    """Points for the pruned trials, the whole ones and the best, at their places."""
    best = tuned.best_trial
    kinds = [trial.status if trial is not best else "best" for trial in trials]
    series: list[Series] = []
    for kind, name, shade in (("pruned", "pruned", PRUNED), ("complete", "complete", WHOLE), ("best", "best", BEST)):
        chosen = [index for index, found in enumerate(kinds) if found == kind]
        values = _values(tuned, [trials[index] for index in chosen])
        drawn = [index for index, value in zip(chosen, values, strict=True) if math.isfinite(value)]
        if drawn:
            x = np.array([places[index] for index in drawn])
            series.append(Points(name, x, values[np.isfinite(values)], shade))
    return series


def _place(entry: dict[str, Any], value: Any) -> Any:
    if "choices" in entry:
        return _text(value)
    return math.log10(value) if entry["log"] else float(value)


def _text(value: Any) -> str:
    """A choice on an axis: 32, or 0.9 above 0.999."""
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _values(tuned: Tuned, trials: Sequence[Trial]) -> np.ndarray:
    return (100.0 if _large(tuned) else 1.0) * np.array([trial.value for trial in trials], dtype=float)


def _log(tuned: Tuned) -> bool:
    return not _large(tuned) and spans_decades(_values(tuned, tuned.trials))


def _large(tuned: Tuned) -> bool:
    return tuned.metric.endswith("accuracy")


def _label(tuned: Tuned) -> str:
    return tuned.metric.replace("_", " ") + (" (%)" if _large(tuned) else "")
