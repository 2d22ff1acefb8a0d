"""What the figure functions share."""

from collections.abc import Sequence

from losslab.report.contents import Run

Colours = dict[str, str]  # run -> its colour in all pictures


def dodged(runs: Sequence[Run], dotted: str) -> list[tuple[Run, float]]:
    """The runs that have the array, each with a small shift in x, so that bars do not cover each other."""
    having = [run for run in runs if run.array(dotted).size]
    step = min(0.12, 0.5 / max(len(having), 1))
    return [(run, step * (index - (len(having) - 1) / 2)) for index, run in enumerate(having)]
