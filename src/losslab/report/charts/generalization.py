"""Train against test, the PAC-Bayes bound, and how far the weights may be blurred."""

import numpy as np

from losslab.report.chart import Chart, Panel, Points, Series
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Run

RATES = (
    ("training error", "train.accuracy", "train.accuracy_error"),
    ("test error", "test.accuracy", "test.accuracy_error"),
)
LOSSES = (("training loss", "train.loss", "train.loss_error"), ("test loss", "test.loss", "test.loss_error"))


def generalization(contents: Contents, colours: Colours) -> list[Chart]:
    """Errors on both splits with the bound beside them, and the expected rise against σ."""
    gaps: list[Series] = []
    rises: list[Series] = []
    for run in contents.runs:
        gaps += _gap(run, colours[run.name])
        sigmas, values = run.array("generalization.pac_bayes.sigmas"), run.array("generalization.pac_bayes.rises")
        if np.isfinite(values).any():
            errors = run.array("generalization.pac_bayes.rise_errors")
            rises.append(Points(run.name, np.log10(sigmas), values, colours[run.name], errors, joined=True))
    panels = []
    if gaps:
        rates = any("error" in name for series in gaps for name in series.x)
        panels.append(Panel("", "share of wrong answers" if rates else "loss", gaps))
    if rises:
        panels.append(Panel("log₁₀ σ of the noise in the weights", "expected rise on the training data", rises))
    if not panels:
        return []
    caption = (
        "Left: the gap between training and test data, bars one standard error, and the most that the PAC-Bayes bound "
        "allows for blurred weights (near 1 it says nothing); right: the further to the right a curve rises, the "
        "flatter the solution."
    )
    return [Chart("generalization", "Generalisation", caption, panels)]


def _gap(run: Run, colour: str) -> list[Series]:
    has_classes = np.isfinite(run.array("generalization.train.accuracy")).any()
    names, values, errors = [], [], []
    for name, value, error in RATES if has_classes else LOSSES:
        found = _number(run, value)
        names.append(name)
        values.append(1 - found if has_classes else found)
        errors.append(_number(run, error))
    if has_classes:
        names.append("PAC-Bayes bound")
        values.append(_number(run, "pac_bayes.bound"))
        errors.append(0.0)
    known = np.isfinite(values)
    if not known.any():
        return []
    bars = np.array(errors)[known]
    return [Points(run.name, np.array(names)[known], np.array(values)[known], colour, bars)]


def _number(run: Run, dotted: str) -> float:
    value = run.array(f"generalization.{dotted}")
    return float(value) if value.size else np.nan
