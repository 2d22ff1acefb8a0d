"""What the folder of a comparison holds: the record, and the curves of the runs that count."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losslab.studies.compare.layout import PLAN, Layout
from losslab.studies.compare.plan import CompareConfig
from losslab.studies.compare.result import Comparison, load
from losslab.studies.config_file import read_mapping
from losslab.studies.record import RunFolder

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Compared:
    """All that the report of a comparison is made from.

    Attributes:
        name: The folder's.
        comparison: The record.
        curves: For each optimizer the evaluations of each finished run, a seed each.
        plan: What was asked for, as plain values.
        environment: Of the first run.
    """

    name: str
    comparison: Comparison
    curves: dict[str, list[Rows]]
    plan: dict[str, Any]
    environment: dict[str, Any]


def is_comparison(folder: str | Path) -> bool:
    """Whether `losslab compare` has begun there."""
    return (Path(folder) / PLAN).is_file()


def read(folder: str | Path) -> Compared:
    """Read the folder of a comparison.

    Raises:
        FileNotFoundError: If it holds none.
    """
    path = Path(folder)
    comparison, plan = load(path), read_mapping(path / PLAN)
    layout = Layout(path, CompareConfig.model_validate(plan))
    runs = {
        name: [RunFolder(layout.seed_run(name, seed)) for seed in comparison.seeds]
        for name in (contender.name for contender in comparison.contenders)
    }
    finished = {name: [run for run in each if run.is_run() and run.final is not None] for name, each in runs.items()}
    first = next((run for each in finished.values() for run in each), None)
    curves = {
        name: [[row for row in run.metrics() if row.get("kind") == "epoch"] for run in each]
        for name, each in finished.items()
    }
    return Compared(path.resolve().name, comparison, curves, plan, first.environment if first is not None else {})
