"""What the figure functions share."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from losslab.report.chart import Chart
from losslab.report.contents import Contents, Run

Colours = dict[str, str]  # run -> its colour in all pictures
Figures = Callable[[Contents, Colours], list[Chart]]  # a figure function


def dodged(runs: Sequence[Run], dotted: str) -> list[tuple[Run, float]]:
    """The runs that have the array, each with a small shift in x, so that bars do not cover each other."""
    having = [run for run in runs if run.array(dotted).size]
    step = min(0.12, 0.5 / max(len(having), 1))
    return [(run, step * (index - (len(having) - 1) / 2)) for index, run in enumerate(having)]


def selections(records: Sequence[dict[str, Any]], *shown: str) -> list[list[dict[str, Any]]]:
    """Records in groups that show the same examples and the same parts, in the order of their steps."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        source = record["source"]
        key = repr([source["split"], source["examples"], *(record[name] for name in shown)])
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def slug(name: str) -> str:
    """A layer's name as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)
