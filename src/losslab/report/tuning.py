"""The page of a study: the best configuration, all trials from good to bad, pictures; from `tuning.json` alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from losslab.report import matplotlib_backend
from losslab.report.charts.tuning import charts as charts_of
from losslab.report.charts.tuning import short_names
from losslab.report.page import drawings, template
from losslab.report.table import Cell, number, percent
from losslab.studies.record import write_atomically
from losslab.studies.tuning.result import Trial, Tuned, ranking


@dataclass(frozen=True)
class Entry:
    """A column of the table and its entry of the glossary."""

    title: str
    formula: str
    meaning: str
    caveat: str = ""


GLOSSARY = (
    Entry("value", "the metric on the validation split, at the trial's last evaluation",
          "What is compared: of the network that a training hands over.",
          "All trials have one seed: a difference as small as that between two seeds says nothing."),
    Entry("pruned", "ended at a ninth or a third of its steps, being worse there than two thirds of the others",
          "Saves time for better trials.", "A slow starter is lost, too."),
    Entry("diverged", "the loss was not finite any more", "Counts as worse than any value.",
          "Many of them mean that the ranges of the learning rates begin too high."),
    Entry("importance", "variance of the trials' order that one parameter explains / variance (fANOVA)",
          "Large means that the parameter is worth more trials, small that it could be left at any value of its range.",
          "A guess below ten trials for each parameter."),
)  # fmt: skip


def is_tuning(folder: str | Path) -> bool:
    """Whether `losslab tune` left a result there."""
    return (Path(folder) / "tuning.json").is_file()


def build(folder: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into the folder of a study, finished or not.

    Returns:
        The page's path.

    Raises:
        FileNotFoundError: If the folder holds no result of a study.
    """
    tuned, path = Tuned.read(folder), Path(folder)
    charts = charts_of(tuned)
    images = matplotlib_backend.save_all(charts, folder)
    text = yaml.safe_dump(tuned.best.model_dump(mode="json"), sort_keys=False)
    page = template("tuning.html.j2").render(
        contents={"name": path.resolve().name},
        summary=in_words(tuned),
        heads=heads(tuned),
        rows=rows(tuned),
        remarks=list(tuned.warnings),
        columns=GLOSSARY,
        drawings=drawings(charts, images),
        configurations=[("best.yaml", text)] if tuned.trials else [],
    )
    write_atomically(path / "report.html", page.encode())
    return path / "report.html"


def in_words(tuned: Tuned) -> str:
    """The outcome in one sentence."""
    counts = {status: sum(trial.status == status for trial in tuned.trials) for status in ("pruned", "diverged")}
    ended = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    of = f"{len(tuned.trials)} of {tuned.asked} trials" + (f" ({ended})" if ended else "")
    best = tuned.best_trial
    if best is None:
        return f"{of}: nothing is known yet."
    names = short_names(list(tuned.space))
    values = ", ".join(f"{names[key]} = {written(value)}" for key, value in best.parameters.items())
    return f"{of}: the best, trial {best.number}, has {values} and {metric(tuned)} {value_of(tuned, best).text}."


def metric(tuned: Tuned) -> str:
    """The metric's name in words."""
    return tuned.metric.replace("_", " ")


def heads(tuned: Tuned) -> list[str]:
    """The titles of the table's columns."""
    return ["trial", metric(tuned), "ended", "steps", "seconds", *short_names(list(tuned.space)).values()]


def rows(tuned: Tuned) -> list[tuple[str, list[Cell]]]:
    """The table: each trial's number and cells, the best first."""
    ordered = ranking(tuned.trials, maximize=tuned.metric.endswith("accuracy"))
    return [(f"{trial.number:03}", _cells(tuned, trial)) for trial in ordered]


def _cells(tuned: Tuned, trial: Trial) -> list[Cell]:
    steps = Cell(number(trial.steps), "" if trial.share == 1 else f"{trial.share:.0%} of all")
    parameters = [Cell(written(trial.parameters[key])) for key in tuned.space]
    return [value_of(tuned, trial), Cell(trial.status), steps, Cell(number(trial.seconds, 3)), *parameters]


def value_of(tuned: Tuned, trial: Trial) -> Cell:
    """A trial's value; that of a trial which was ended early is no result."""
    text = percent(trial.value) if tuned.metric.endswith("accuracy") else number(trial.value)
    reasons = {"pruned": "ended early: its value is that of an unfinished training", "diverged": "it diverged"}
    return Cell("—" if trial.status == "diverged" else text, reason=reasons.get(trial.status, ""))


def written(value: Any) -> str:
    """A parameter's value."""
    if isinstance(value, list | tuple):
        return f"({', '.join(map(str, value))})"
    return number(value, 3) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
