"""How the training went."""

from collections.abc import Sequence

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Series, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents, Run
from losslab.studies.batch_file import together

FEW_EPOCHS = 12  # that each get a tick, since there are no half epochs


def training(contents: Contents, colours: Colours) -> list[Chart]:
    """Loss and accuracy over the epochs, on the training and the validation split; of several seeds the median."""
    runs = [run for run in contents.runs if run.epochs]
    groups = together(runs)
    panels = []
    for quantity, label in (("loss", "loss"), ("accuracy", "accuracy (%)")):
        scale = 1.0 if quantity == "loss" else 100.0
        series: list[Series] = []
        for name, group in groups.items():
            for split in ("train", "validation"):
                epochs, values = _median(group, f"{split}_{quantity}")
                if np.isfinite(values).any():
                    dashed, colour = split == "validation", colours[group[0].name]
                    text = f"{name}, validation" if dashed else name
                    series.append(Line(text, epochs, scale * values, colour, dashed=dashed, legend=not dashed))
        if series:
            log = quantity == "loss" and spans_decades(np.concatenate([s.y for s in series]))
            step = 1 if max(len(run.epochs) for run in runs) <= FEW_EPOCHS else None
            panels.append(Panel("epoch", label, series, log_y=log, x_step=step))
    caption = (
        "Solid lines are the training examples, each taken before its step, dashed ones the validation split after the "
        "epoch: a dashed loss that turns upwards while the solid one falls is overfitting."
    )
    if len(groups) < len(runs):
        caption += " Of runs that differ in their seed alone each line is the median."
    return [Chart("training", "Training curves", caption, panels)] if panels else []


def _median(group: Sequence[Run], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The epochs that a run of the group has, and the median over the runs that have them."""
    found: dict[float, list[float]] = {}
    for run in group:
        for row in run.epochs:
            found.setdefault(row["epoch"], []).append(np.nan if row.get(key) is None else row[key])
    epochs = sorted(found)
    return np.array(epochs, dtype=float), np.array([np.median(found[epoch]) for epoch in epochs], dtype=float)
