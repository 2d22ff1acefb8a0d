"""How the training went."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from losslab.report.chart import Chart, Line, Panel, Series, spans_decades
from losslab.report.charts.common import Colours
from losslab.report.contents import Contents

FEW_EPOCHS = 12  # that each get a tick, since there are no half epochs


def training(contents: Contents, colours: Colours) -> list[Chart]:
    """Loss and accuracy over the epochs, on the training and the validation split."""
    runs = [run for run in contents.runs if run.epochs]
    panels = []
    for quantity, label in (("loss", "loss"), ("accuracy", "accuracy (%)")):
        scale = 1.0 if quantity == "loss" else 100.0
        series: list[Series] = []
        for run in runs:
            epochs = np.array([row["epoch"] for row in run.epochs], dtype=float)
            for split in ("train", "validation"):
                values = scale * _column(run.epochs, f"{split}_{quantity}")
                if np.isfinite(values).any():
                    dashed = split == "validation"
                    name = f"{run.name}, validation" if dashed else run.name
                    line = Line(name, epochs, values, colours[run.name], dashed=dashed, legend=not dashed)
                    series.append(line)
        if series:
            log = quantity == "loss" and spans_decades(np.concatenate([s.y for s in series]))
            step = 1 if max(len(run.epochs) for run in runs) <= FEW_EPOCHS else None
            panels.append(Panel("epoch", label, series, log_y=log, x_step=step))
    caption = (
        "Solid lines are the training examples, each taken before its step, dashed ones the validation split after the "
        "epoch: a dashed loss that turns upwards while the solid one falls is overfitting."
    )
    return [Chart("training", "Training curves", caption, panels)] if panels else []


def _column(rows: Iterable[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], dtype=float)
